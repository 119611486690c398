"""Tar shards as other tools and hands make them, for tests."""

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.sources.shards import ShardSet, open_source


def opened(root: Path | str) -> ShardSet:
    found = open_source(str(root))
    assert isinstance(found, ShardSet)
    return found


def refusal(root: Path | str) -> str:
    with pytest.raises(ValueError) as caught:
        open_source(str(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """As webdataset's writer: PAX, with a fractional time that takes a header of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
