"""Which folders of a data set are trained on and which are held out, and what neither uses.

Splits are known by name, in any case and with what is often appended: Training, TRAIN, train2017,
test_set; with a name before it where both splits have it: seg_train and seg_test. A folder of
classes may have one named train (VOC has trains) or valid: a folder is one of splits if it has one
to train on and, beside it, one that is held out or no other folder of images.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from pipeline.sources.folder import IMAGE_EXTENSIONS, ImageFolder, printable
from pipeline.sources.index import is_shard

TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "dev", "holdout", "heldout", "eval", "test", "testing")
"""The first of these that exists is used."""
UNLABELLED = ("unlabeled", "unlabelled")  # in STL-10
KNOWN = (*TRAIN, *HELD_OUT, *UNLABELLED)


def split_root(root: str) -> tuple[str, str | None]:
    """The folders (to train on, to validate on) of a data set; root and None if it has no splits.

    Raises: ValueError if several folders are named as the split to train on.
    """
    folders = _folders(root)
    splits = _splits_of(folders)
    train = [name for name in folders if splits[name] in TRAIN]
    held_out = sorted(
        (HELD_OUT.index(split), name) for name, split in splits.items() if split in HELD_OUT
    )
    others = (name for name in folders if splits[name] not in (*TRAIN, *UNLABELLED))
    if not train or not (held_out or not any(map(_has_images, _paths(root, others)))):
        return root, None
    exact = [name for name in train if name.lower() in TRAIN]
    train = exact if len(exact) == 1 else train  # beside train_224
    if len(train) > 1:
        raise ValueError(
            f"{root} has {' and '.join(map(_shown, sorted(train)))}, all named as the split to "
            "train on: give one of them as --data.root, and its held-out images as --data.val"
        )
    val = _inner(os.path.join(root, held_out[0][1])) if held_out else None
    return _inner(os.path.join(root, train[0])), val


def _inner(folder: str) -> str:
    """seg_train/seg_train, as some archives are unpacked, for a seg_train that holds it alone."""
    name = os.path.basename(folder)
    inner = os.path.join(folder, name)
    is_alone = [entry.name for entry in _entries(folder)] == [name]
    return inner if is_alone and os.path.isdir(inner) else folder


def tell_unused(root: str, train: str, val: str | None) -> list[str]:
    """A line for each folder under root, and its own images, that are neither in train nor val.

    Without splits: a line for each folder that is named as a held-out one and trained on.
    """
    lines, folders = [], sorted(_folders(root))
    splits = _splits_of(folders)
    if train == root:
        for path in _paths(root, folders):
            if splits[os.path.basename(path)] in HELD_OUT and (count := _count(path)):
                lines.append(
                    f"{_shown(path)} ({count}) is trained on: if it is held out, move it "
                    f"out of {_shown(root)} and give it as --data.val"
                )
        return lines
    used = {os.path.realpath(path) for path in (train, val) if path is not None}
    used |= {os.path.dirname(path) for path in used if _inner(os.path.dirname(path)) == path}
    for path in _paths(root, folders):
        if os.path.realpath(path) not in used and (count := _count(path)):
            is_held_out = splits[os.path.basename(path)] in HELD_OUT
            why = "--data.val takes it" if is_held_out else f"{_shown(train)} is trained on"
            lines.append(f"{_shown(path)} ({count}) is not used: {why}")
    beside = sum(_is_image(entry.name) and entry.is_file() for entry in _entries(root))
    if beside:
        lines.append(
            f"{beside} images in {_shown(root)} itself are not used: {_shown(train)} is trained on"
        )
    return lines


def tell_inner(folder: ImageFolder) -> list[str]:
    """One line where folders one level down are splits, such as archive/train and archive/test."""
    counts = Counter(
        (parts[0], parts[1]) for path in folder.paths if len(parts := path.split(b"/", 2)) == 3
    )
    inner: dict[bytes, list[str]] = {}
    for first, second in counts:
        inner.setdefault(first, []).append(os.fsdecode(second))
    found = []
    for first, names in inner.items():
        splits = _splits_of(names)
        if any(split in TRAIN for split in splits.values()):
            found += [(first, name) for name in names if splits[name] in HELD_OUT]
    if not found:
        return []
    first, name = found[0]
    path = os.path.join(folder.root, os.fsdecode(first))
    count = counts[first, os.fsencode(name)]
    remedy = f"give {_shown(path)} as --data.root" if len(inner) == 1 else "move it out"
    more = f", as are {len(found) - 1} folders like it" if len(found) > 1 else ""
    held_out = _shown(os.path.join(path, name))
    return [f"{held_out} ({count} images) is trained on{more}: if it is held out, {remedy}"]


def why_no_labels(folder: ImageFolder) -> str:
    """Why its images have no class labels, and what would make them."""
    firsts = sorted({path.partition(b"/")[0] for path in folder.paths if b"/" in path})
    beside = [path for path in folder.paths if b"/" not in path]
    if not firsts:
        return f"{folder.root} has no folders, whose names would be the classes"
    if beside:
        return (
            f"{len(beside)} images, such as {printable(beside[0])}, lie beside the folders of "
            f"{folder.root}: move them into one of these, or out of it"
        )
    inner = os.path.join(folder.root, printable(firsts[0]))
    return f"all images are in {inner}: if its folders are the classes, give it instead"


def _splits_of(folders: list[str]) -> dict[str, str]:
    """The split that each folder is named as, or its name in lower case.

    The last word counts where a split to train on and a held-out one have the same words before it.
    """
    splits = {name: split_of(name) for name in folders}
    ends: dict[str, dict[str, str]] = {}
    for name in folders:
        before, separator, last = name.rpartition("_") if "_" in name else name.rpartition("-")
        if separator and splits[name] not in KNOWN:
            ends.setdefault(before.lower(), {})[name] = split_of(last)
    for named in ends.values():
        if any(s in TRAIN for s in named.values()) and any(s in HELD_OUT for s in named.values()):
            splits |= named
    return splits


def role_of(name: str) -> str:
    """ "train", "held out", or "" for a folder that is not named as a split."""
    split = split_of(name)
    return "train" if split in TRAIN else "held out" if split in HELD_OUT else ""


def split_of(name: str) -> str:
    """train of Train_Set, val of val2017; the name itself, in lower case, of others."""
    plain = re.sub(r"[\W\d_]+", "", name.lower())
    return re.sub(r"(?<=.)(set|split|images|imgs|data)$", "", plain)


def _entries(root: str) -> Iterator[os.DirEntry[str]]:
    """What is in a folder and not hidden; nothing where that cannot be read."""
    try:
        with os.scandir(root) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError:  # whoever lists the images says so
        return


def _folders(root: str) -> list[str]:
    # by name first: a flat folder of links would be a stat for each
    return [
        entry.name for entry in _entries(root) if not _is_image(entry.name) and _is_folder(entry)
    ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _paths(root: str, names: Iterable[str]) -> Iterator[str]:
    return (os.path.join(root, name) for name in names)


def _is_image(name: str) -> bool:
    is_hidden = name.startswith(".")  # macOS writes ._x.jpg
    return not is_hidden and os.fsencode(os.path.splitext(name)[1].lower()) in IMAGE_EXTENSIONS


def _has_images(folder: str) -> bool:
    return any(any(map(_is_image, names)) for _, _, names in os.walk(folder, followlinks=False))


def _count(folder: str) -> str:
    """ "4 images" or "2 shards"; "" where there are neither."""
    images = shards = 0
    for _, _, names in os.walk(folder):
        images += sum(map(_is_image, names))
        shards += sum(is_shard(name) for name in names)
    if images:
        return f"{images} images"
    return f"{shards} shards" if shards else ""


def _shown(path: str) -> str:
    return printable(os.fsencode(path))
