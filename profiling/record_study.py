"""Keep the studies of a folder: `python profiling/record_study.py runs/study`.

Copies study-NAME.json and .png to profiling/results/, keeps what `all` took as study-all, and puts
each table and figure between its marks in docs/study.md: <!-- study-NAME --> ... <!-- end -->.
A newcomer's mistake: writing a figure into docs/study.md's tables by hand. The next run of this
puts the recorded ones there.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import shutil
from pathlib import Path

from measure.results import result_path
from train.run.program import refuse
from train.studies.report import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs" / "study.md"


def record_study(folder: Path) -> list[Path]:
    """Keep every study of the folder. Raises: ValueError where runs are of several revisions."""
    files = sorted(folder.glob("study-*.json"))
    if not files:
        raise ValueError(f"{folder} has no study-*.json: run train/study.py --out {folder} first")
    kept, text = [], DOCS.read_text()
    for file in files:
        found = json.loads(file.read_text())
        if len(found["revisions"]) != 1:
            raise ValueError(
                f"the runs of {file} are of {len(found['revisions'])} revisions: take a new --out"
            )
        targets = [
            result_path(file.stem, found["environment"]["device"], kind)
            for kind in (".json", ".png")
        ]
        for target in targets:
            shutil.copyfile(file.with_suffix(target.suffix), target)
        text = put_into(text, file.stem, shown(found, targets))
        kept += targets
    if (whole := folder / "result-all.json").exists():
        device = json.loads(whole.read_text())["environment"]["device"]
        kept.append(Path(shutil.copyfile(whole, result_path("study-all", device))))
    DOCS.write_text(text)
    return kept


def shown(found: dict, files: list[Path]) -> str:
    """A study's table, figure and file as docs/study.md has them."""
    data, picture = (f"../profiling/results/{file.name}" for file in files)
    return f"{markdown(found)}\n![{found['title']}]({picture})\n[all figures]({data})\n"


def put_into(text: str, name: str, block: str) -> str:
    """The text with the block between the marks of that name. Raises: ValueError without them."""
    mark, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, found, rest = text.partition(mark)
    _, closed, after = rest.partition(end)
    if not (found and closed) or mark in after:
        raise ValueError(f"docs/study.md needs one <!-- {name} --> ... <!-- end -->")
    return before + mark + block + end + after


def main() -> None:
    """Read the flags, record, print the files' names as one JSON line."""
    parser = argparse.ArgumentParser(description="Keep the studies of a folder.")
    parser.add_argument("folder", type=Path, help="--out of train/study.py")
    try:
        files = record_study(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    print(json.dumps({"files": [str(file) for file in files]}))


if __name__ == "__main__":
    main()
