"""The classes of a set of shards: from the folders inside tar files, or from their labels.

A newcomer's mistake: to number the classes of each shard or folder by itself. Names are the
identity of a class here; numbers follow from the sorted names of the whole set.
"""

import os

import numpy as np

from pipeline.sources.folder import printable
from pipeline.sources.index import ShardIndex, sorted_classes
from pipeline.sources.scan import TAR
from pipeline.sources.splits import role_of


def labels_of(
    shards: list[str], indices: list[ShardIndex]
) -> tuple[np.ndarray | None, list[str], str]:
    """The labels of a set, the names of its classes, and why there are no labels.

    Classes are the first folders of tar files' members if these tell no others apart than their
    labels: so shards of folders that were packed each for itself have the same names.

    Raises   ValueError where some shards name their classes and others number them.
    """
    classes = [(index.class_names, index.labels) for index in indices]
    if (by_folder := _by_folder(indices)) is not None:
        classes = by_folder
    kinds = {all(map(str.isdecimal, names)): n for n, (names, _) in enumerate(classes) if names}
    if len(kinds) == 2 and by_folder is None:
        named, numbered = shards[kinds[False]], shards[kinds[True]]
        raise ValueError(
            f"{named} has names of classes such as {classes[kinds[False]][0][0]}, and {numbered} "
            "numbers: they are of two sets, or an index was lost. Name one set with a glob, or "
            "pack the folder again"
        )
    names = classes[0][0]
    if any(other != names for other, _ in classes):
        union = {name for others, _ in classes for name in others}
        names = sorted_classes(union) if by_folder is None else sorted(union, key=os.fsencode)
    if by_folder is not None and {"train", "held out"} <= set(map(role_of, names)):
        return (
            None,
            [],
            f"their folders are splits ({', '.join(names)}), all of which are trained on",
        )
    numbers = {name: number for number, name in enumerate(names)}
    tables = [np.array([*(numbers[name] for name in others), -1]) for others, _ in classes]
    parts = [table[labels] for table, (_, labels) in zip(tables, classes, strict=True)]
    labels = np.concatenate(parts)  # -1 took a table's last
    if (missing := labels < 0).any():
        number = next(n for n, part in enumerate(parts) if part.min() < 0)
        first = names_of(indices[number])[int(parts[number].argmin())]
        shard = os.path.basename(shards[number])
        lacking = f"{missing.sum()} of {len(labels)} images have none"
        return None, [], f"{lacking}, such as {shard}: {printable(first)}"
    if labels.min() == labels.max():
        return None, [], f"all {len(labels)} images are of class {names[labels[0]]}"
    return labels, names, ""


def _by_folder(indices: list[ShardIndex]) -> list[tuple[list[str], np.ndarray]] | None:
    """Names and labels by the members' first folders; None where these are not the classes.

    Those that pipeline/pack.py has written have such names already.
    """
    classes, known, folders, is_told = [], set(), set(), True
    for index in indices:
        if index.packed is not None:
            classes.append((index.class_names, index.labels))
            continue
        if index.kind != TAR or b"/" not in index.listing[: index.ends[0]].tobytes():
            return None
        parts = [name.removeprefix(b"./").partition(b"/") for name in names_of(index)]
        if not all(slash for _, slash, _ in parts):
            return None
        texts = [printable(folder) for folder, _, _ in parts]
        names = sorted(set(texts), key=os.fsencode)  # as a folder's
        numbers = {name: number for number, name in enumerate(names)}
        told = [*index.class_names, ""]
        pairs = {(told[label], text) for label, text in zip(index.labels, texts, strict=True)}
        here = {label for label, _ in pairs}
        is_told &= "" not in here and len(pairs) == len(here) == len(names)
        known |= here
        folders |= set(names)
        classes.append((names, np.array([numbers[text] for text in texts])))
    # shards numbered apart have more folders than numbers; shards in one folder have fewer
    is_told &= len(folders) >= len(known)
    return classes if is_told or (known == {""} and len(folders) > 1) else None


def names_of(index: ShardIndex) -> list[bytes]:
    """The names of a shard's images."""
    return index.listing.tobytes().split(b"\0")[::2]
