"""Keep the studies of a folder: `python profiling/record_study.py runs/study`.

Copies study-NAME.json and .png to profiling/results/, result-all.json as study-all, and puts each
table and figure between its marks in docs/study.md: <!-- study-NAME --> ... <!-- end -->.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import re
import shutil
from pathlib import Path

from measure.results import result_path
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.run.program import exit_on_error
from train.studies.report import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs" / "study.md"


def record_study(folder: Path) -> list[Path]:
    """Keep every study of the folder. Raises: ValueError if runs are of several revisions."""
    files = sorted(folder.glob("study-*.json"))
    if not files:
        raise ValueError(f"{folder} has no study-*.json: run train/study.py --out {folder} first")
    kept, text = [], DOCS.read_text()
    for file in files:
        study = json.loads(file.read_text())
        if (revisions := len(study["revisions"])) != 1:
            raise ValueError(f"the runs of {file} are of {revisions} revisions: take a new --out")
        device = study["environment"]["device"]
        targets = [result_path(file.stem, device, kind) for kind in (".json", ".png")]
        for target in targets:
            shutil.copyfile(file.with_suffix(target.suffix), target)
        text = put_into(text, file.stem, block(study, targets))
        kept += targets
    if (whole := folder / "result-all.json").exists():
        device = json.loads(whole.read_text())["environment"]["device"]
        kept.append(Path(shutil.copyfile(whole, result_path("study-all", device))))
    DOCS.write_text(text)
    return kept


def block(study: dict, files: list[Path]) -> str:
    """A study's table, figure and file for docs/study.md."""
    data, picture = (f"../profiling/results/{file.name}" for file in files)
    return f"{markdown(study)}\n![{study['title']}]({picture})\n[all figures]({data})\n"


def put_into(text: str, name: str, content: str) -> str:
    """The text with the content between the marks of that name. Raises: ValueError without them."""
    marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    text, count = re.subn(marks, lambda m: m[1] + content + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"docs/study.md needs one <!-- {name} --> ... <!-- end -->")
    return text


def main() -> None:
    """Read the flags, record, print the files' names as one JSON line."""
    parser = argparse.ArgumentParser(description="Keep the studies of a folder.")
    parser.add_argument("folder", type=named_path, help="--out of train/study.py")
    folder = parser.parse_args().folder
    with exit_on_error():
        files = [str(file) for file in record_study(folder)]
        print_result({"files": files}, kept=folder)


if __name__ == "__main__":
    protect_output()
    main()
