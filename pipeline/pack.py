"""Pack a folder of images into tar shards: `python pipeline/pack.py SRC DEST`.

DEST/images-000000.tar ... are WebDataset shards (members key.jpg and key.cls) in the folder's
order, each with its index; `--data.root DEST` trains from them as from SRC. Of a SRC with train/
and val/ both are packed, and key.cls counts the classes of both together. Every image is checked by
its header and decoded by Pillow, which finds more damage than DALI; what fails is left out,
reported and listed in DEST/left_out.jsonl. The same command continues after a kill and makes the
same bytes: it keeps every shard that is whole and whose images still have the bytes that were
packed, for which it reads them.

The images stay encoded, so decoding costs the same; what is saved is a million opens on storage
that is slow at them.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import hashlib
import io
import json
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.machine import usable_cores
from pipeline.sources import index as shard_index
from pipeline.sources.folder import ImageFolder, list_images, printable
from pipeline.sources.header import BadImage, read_header
from pipeline.sources.index import Packed, ShardIndex
from pipeline.sources.paths import named_path
from pipeline.sources.reader import hash_images
from pipeline.sources.scan import TAR, Contents, Entry
from pipeline.sources.splits import split_root, tell_unused
from pipeline.streams import print_result, protect_output

RENAMED = b"renamed"
_META = re.compile(rb"__[^/]*__/")  # webdataset passes over members of such names
_BLOCK = 64  # images that are read and checked before they are written, in memory at once
_MAX_NAME_BYTES = 100  # of the tar format; DALI's reader refuses the extensions for longer ones


def pack(
    folder: ImageFolder,
    dest: Path,
    *,
    classes: Sequence[str],
    shard_bytes: int,
    tell: Callable[[str], None],
    moved: Callable[[int], None],
) -> list[ShardIndex]:
    """Write the shards of a folder that dest lacks; return the indices of all.

    classes: numbered in the shards; the folder's, and perhaps others. tell is called with a line
    for each shard, moved with the number of images done.

    Raises   ValueError when dest holds shards of other images or another size, cannot be written,
             or no image is good.
    """
    Image.init()  # all its plugins now: threads that load them at once miss some
    indices: list[ShardIndex] = []
    position = 0
    try:
        dest.mkdir(parents=True, exist_ok=True)
        lock = FileLock(dest / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{dest} is being packed by another process") from None
    except OSError as error:
        reason = f"{dest} cannot be written ({error.strerror})"
        raise ValueError(f"{reason}: name a folder that can") from None
    left_out: list[list[str]] = []
    with lock, ThreadPoolExecutor(usable_cores()) as pool:
        while position < len(folder):
            shard = dest / f"images-{len(indices):06d}.tar"
            index, state = _finished(shard, folder, position, shard_bytes, classes), "was there"
            is_changed = index is not None and has_changed(index, folder, pool, moved)
            if index is None or is_changed:
                images = checked(folder, position, pool, moved)
                index = _write_shard(shard, folder, position, shard_bytes, images, classes)
                state = f"{index.num_bytes / 2**20:.1f} MiB"
            if is_changed:
                state += ", written again: its images have changed"
            assert index.packed is not None
            indices.append(index)
            moved(position := index.packed.end)
            line = f"{shard.name}: {len(index.ends)} images, {state}"
            if new := index.packed.left_out:
                line += f", {len(new)} left out, such as {': '.join(new[0])}"
            left_out += new
            tell(line)
        _remove_surplus(dest, folder, len(indices), tell)
    if left_out:
        lines = [json.dumps({"file": name, "reason": why}) + "\n" for name, why in left_out]
        (dest / "left_out.jsonl").write_text("".join(lines))
    else:
        (dest / "left_out.jsonl").unlink(missing_ok=True)
    return indices


def has_changed(
    index: ShardIndex,
    folder: ImageFolder,
    pool: ThreadPoolExecutor,
    moved: Callable[[int], None],
) -> bool:
    """Whether images of a shard have other bytes than when they were packed."""
    assert index.packed is not None
    numbers = range(index.packed.first, index.packed.end)
    return hash_images(folder, numbers, pool, moved) != index.packed.content


def _remove_surplus(
    dest: Path, folder: ImageFolder, num_shards: int, tell: Callable[[str], None]
) -> None:
    """Remove later shards of the same folder: where more images are bad, fewer are written."""
    number = num_shards
    while os.path.exists(shard_index.index_path(str(dest / f"images-{number:06d}.tar"))):
        shard = dest / f"images-{number:06d}.tar"
        packed = shard_index.read_index(str(shard)).packed
        if packed is None or packed.source != folder.fingerprint:
            return
        shard.unlink(missing_ok=True)
        os.unlink(shard_index.index_path(str(shard)))
        tell(f"{shard.name} was removed: the shards before it hold all images")
        number += 1


def _finished(
    shard: Path, folder: ImageFolder, position: int, shard_bytes: int, classes: Sequence[str]
) -> ShardIndex | None:
    """Return the index of a shard that is whole, None for one to be written."""
    if not shard.exists():  # an index without its shard is of no use
        return None
    if not os.path.exists(shard_index.index_path(str(shard))):
        raise ValueError(f"{shard} exists without an index: remove it, or choose another DEST")
    try:
        packed = shard_index.read_index(str(shard)).packed
    except ValueError:  # truncated by a power cut
        return None
    if packed is None or packed.source != folder.fingerprint:
        raise ValueError(
            f"{shard} holds other images than {folder.root} (files were added, removed or changed "
            "there): choose another DEST, or empty this one"
        )
    if packed.shard_bytes != shard_bytes:
        raise ValueError(
            f"{shard} was packed with --shard-mib {packed.shard_bytes / 2**20:.12g}: use the same, "
            "or another DEST"
        )
    try:
        index = shard_index.load_index(str(shard)) if packed.first == position else None
        return index if index is None or index.class_names == [*classes] else None
    except (ValueError, OSError):  # changed since
        return None


def _write_shard(
    shard: Path,
    folder: ImageFolder,
    first: int,
    shard_bytes: int,
    images: Iterator[tuple[int, bytes, str]],
    classes: Sequence[str],
) -> ShardIndex:
    """Write the images that fit into a shard, then its index."""
    contents, left_out, end = Contents(TAR), [], len(folder)
    numbers = {name: number for number, name in enumerate(classes)}
    digest = hashlib.sha256()
    keys: set[bytes] = set()
    temporary = shard.with_name(f".{shard.name}.part")
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number, data, reason in images:
                    fits = tar.offset + len(data) <= shard_bytes or not contents.images
                    if not (reason or fits):
                        end = number
                        break
                    digest.update(data or reason.encode())
                    if reason:
                        left_out.append([folder.name(number), reason])
                        continue
                    entry = _add(tar, keys, folder, number, data, numbers)
                    contents.images.append(entry)
            file.flush()
            os.fsync(file.fileno())
        if not contents.images:
            raise ValueError(
                f"None of the {len(left_out)} images of {folder.root} is good, such as "
                f"{': '.join(left_out[0])}"
            )
        if left_out:
            contents.skipped["left out when packed"] = len(left_out)
        packed = Packed(
            source=folder.fingerprint,
            num_images=len(folder),
            shard_bytes=shard_bytes,
            first=first,
            end=end,
            left_out=left_out,
            content=digest.hexdigest(),
        )
        names = [*classes]
        index = shard_index.build_index(str(temporary), contents, class_names=names, packed=packed)
        # before the shard: one without an index would pass for another tool's
        shard_index.save_index(str(shard), index)
        os.replace(temporary, shard)
    except OSError as error:
        raise ValueError(
            f"{shard} cannot be written ({error.strerror}): the same command continues there"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return index


def _add(
    tar: tarfile.TarFile,
    keys: set[bytes],
    folder: ImageFolder,
    number: int,
    data: bytes,
    numbers: Mapping[str, int],
) -> Entry:
    """Append an image and its label; `keys` are those of the shard so far.

    The index has the true name of an image whose name is long, not printable, taken, or has a dot
    in its stem, where WebDataset ends the key. Its member stays in its class folder if that is
    plain: an index made anew has the same classes.
    """
    path, label = folder.paths[number], None
    key, dot, extension = path.rpartition(b".")
    is_plain = _is_plain(path) and b"." not in os.path.basename(key)
    is_plain &= not os.path.basename(key).startswith(RENAMED)
    if not is_plain or key in keys:
        first, slash, _ = path.partition(b"/")
        is_kept = slash and len(first) < 60 and _is_plain(first + slash)
        key = b"%b/%b-%09d" % (first if is_kept else RENAMED, RENAMED, number)
    keys.add(key)
    offset = tar.offset + tarfile.BLOCKSIZE
    parts = [(key + dot + extension, data)]
    if folder.labels is not None:
        label = folder.class_names[folder.labels[number]]
        parts.append((key + b".cls", b"%d" % numbers[label]))
    for name, content in parts:
        info = tarfile.TarInfo(name.decode())  # no time and no owner: the same bytes every time
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return Entry(path, label, len(data), offset, len(data))


def _is_plain(path: bytes) -> bool:
    is_short = len(path) <= _MAX_NAME_BYTES
    return is_short and printable(path).encode() == path and not _META.match(path)


def checked(
    folder: ImageFolder, first: int, pool: ThreadPoolExecutor, moved: Callable[[int], None]
) -> Iterator[tuple[int, bytes, str]]:
    """Yield each image's number from `first` on, its bytes and why it is not good, or ""."""
    for start in range(first, len(folder), _BLOCK):
        numbers = range(start, min(start + _BLOCK, len(folder)))
        found = pool.map(lambda n: check(folder, n), numbers)
        yield from ((number, *image) for number, image in zip(numbers, found, strict=True))
        moved(numbers.stop)


def check(folder: ImageFolder, number: int) -> tuple[bytes, str]:
    """The bytes of an image, and "" if it decodes to its end, else the reason."""
    data = b""
    try:
        data = folder.read(number).tobytes()
        read_header(data)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except BadImage as error:
        if str(error).startswith(("missing", "unreadable")):  # a fault of the disk rather
            raise ValueError(
                f"{folder.root}/{folder.name(number)}: {error}. Fix or remove it; the same "
                "command continues"
            ) from None
        return data, str(error)
    except UnidentifiedImageError:  # its message holds an address
        return data, "does not decode (PIL cannot identify it)"
    except Exception as error:  # PIL's decoders raise nearly anything
        return data, f"does not decode ({error})"
    return data, ""


def pack_root(src: str, dest: Path, *, shard_bytes: int) -> dict:
    """Pack SRC, or its train/ and its val/; returns the last line of stdout."""
    train, val = split_root(src)
    roots = [train] if val is None else [train, val]
    folders = {dest if val is None else dest / os.path.basename(r): list_images(r) for r in roots}
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()
    bar_options = {"console": console, "transient": True, "disable": not console.is_terminal}
    indices: list[ShardIndex] = []
    named = {os.fsencode(name) for folder in folders.values() for name in folder.class_names}
    classes = [os.fsdecode(name) for name in sorted(named)]  # bytewise, as a folder's
    for line in tell_unused(src, train, val):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with Progress(TextColumn("packing"), *columns, **bar_options) as bar:
        for target, folder in folders.items():
            if target.resolve() == Path(folder.root).resolve():
                raise ValueError(f"{target} holds the images: choose another DEST")
            task = bar.add_task("packing", total=len(folder))
            tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
            for kind, count in folder.skipped.items():
                tell(f"left out under {folder.root}: {count} x {kind}")

            def moved(done: int, task=task) -> None:
                bar.update(task, completed=done)

            options = {"shard_bytes": shard_bytes, "tell": tell, "moved": moved}
            indices += pack(folder, target, classes=classes, **options)
    return {
        "folder": str(dest),
        "images": sum(len(index.ends) for index in indices),
        "shards": len(indices),
        "left_out": sum(len(index.packed.left_out) for index in indices if index.packed),
        "bytes": sum(index.num_bytes for index in indices),
    }


def main() -> None:
    """Read the flags, pack, print the totals as one JSON line."""
    parser = argparse.ArgumentParser(description="Pack a folder of images into tar shards.")
    parser.add_argument(
        "src", type=named_path, help="folder of images, or one with train/ and val/"
    )
    parser.add_argument("dest", type=named_path, help="folder for the shards")
    parser.add_argument("--shard-mib", type=float, default=1024, help="size of a shard in MiB")
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # read_header has the limit
    warnings.filterwarnings("ignore", module="PIL")  # about metadata
    try:
        size = arguments.shard_mib * 2**20
        if not 0 < size < float("inf"):
            raise ValueError(f"--shard-mib must be > 0, got {arguments.shard_mib}")
        totals = pack_root(str(arguments.src), arguments.dest, shard_bytes=round(size))
        print_result(totals, kept=arguments.dest)
    except KeyboardInterrupt:
        print("error: stopped; the same command continues after the last shard", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    protect_output()
    main()
