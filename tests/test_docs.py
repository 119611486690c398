"""The documents' links, pictures, commands and flags exist; README's first screen is in order."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from measure.peers import import_torchvision
from train.config.parser import parse_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
WITH_SUBCOMMANDS = {"profiling/gpu_calls.py"}
PASSES_ON = {
    "train/study.py": "train/main.py",
    "profiling/gpu_calls.py": "profiling/gpu_suite.py",
}


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


def commands(text: str) -> list[list[str]]:
    """The words of each command of a page: of its indented blocks, and of `code` in its lines."""
    blocks = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"^ {4}.*(?:\n {4}.*)*", text, re.M)))
    spans = re.findall(r"`([^`\n]+)`", text)
    starts = ("python ", "python3 ", "torchrun ", "make ", "TORCH_DISABLE")
    lines = [line.strip() for line in [*blocks.splitlines(), *spans]]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


@cache
def flags_of(script: str, *subcommand: str) -> frozenset[str]:
    """All that its --help names, and those of the program that it passes flags on to."""
    import_torchvision()  # docs/examples/classify.py's own import needs a build like torch's
    output, before, arguments = io.StringIO(), list(sys.path), sys.argv
    sys.argv = [script, *subcommand, "--help"]
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.suppress(SystemExit),
            mock.patch.dict(os.environ),  # train/launch.py sets torchrun's defaults
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = before, arguments
    more = flags_of(PASSES_ON[script]) if script in PASSES_ON else frozenset()
    # torchrun's own spelling has dashes or underscores
    return frozenset(FLAG.findall(output.getvalue().replace("_", "-"))) | more


def parts(words: list[str]) -> list[tuple[str, list[str]]]:
    """Each script of a command with the words behind it, up to the next script."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.endswith(".py") and not word.startswith("-"):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_and_pictures_of_a_page_exist(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for link in LINK.findall(text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_pictures_are_small_and_each_is_shown():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }  # fmt: skip
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture in shown and picture.stat().st_size < 200_000, picture


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_of_a_page_name_scripts_and_flags_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page.read_text()):
        if words[0] == "make":
            assert words[1] in targets, words
            flags = [word[5:] for word in words if word.startswith("ARGS=")]
            words = ["train/main.py", "--config", "configs/demo.yaml", *shlex.split(*flags or [""])]
        for script, behind in parts(words):
            assert (ROOT / script).is_file(), words
            given = {word.split("=")[0] for word in behind if word.startswith("--")}
            if not given:
                continue
            known = (
                flags_of(script, *behind[:1]) if script in WITH_SUBCOMMANDS else flags_of(script)
            )
            unknown = {flag for flag in given if flag.replace("_", "-") not in known}
            assert not unknown, (words, unknown)
            whole = script == "train/main.py" and "--config" in behind and "..." not in behind
            config = behind[behind.index("--config") + 1] if whole else ""
            if whole and (ROOT / config).is_file() and "NAME" not in behind:
                parse_config(behind)


def test_the_pages_configs_and_results_that_are_named_in_code_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:train|pipeline|kernels|profiling|tests|docs|configs|deploy)/"
                               r"[\w./-]+)`", page.read_text()):  # fmt: skip
            assert (ROOT / path).exists() or "NAME" in path, (page, path)


def test_the_tests_that_the_page_on_reliability_names_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"\[(test_\w+\.py)\]\(\.\./tests/\1\)((?:,? `test_\w+`)*)", text)
    pairs = {(file, name) for file, names in named for name in re.findall(r"test_\w+", names)}
    assert {name for _, name in pairs} == set(re.findall(r"`(test_\w+)`", text))
    for file, name in pairs:
        defined = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
        assert name in defined, (file, name)


def test_readme_has_sentence_picture_commands_and_figures_in_this_order():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    title, sentence, picture, both, table = text.split("\n\n")[:5]
    assert title.startswith("# ") and sentence.count(". ") == 0 and picture.startswith("![")
    assert [line.split()[1] for line in both.splitlines()] == ["demo", "test"]
    rows = table.splitlines()[2:]
    for row in rows:
        link = LINK.findall(row)[-1]
        n = re.findall(r"\[(\d+)\]\(", row)[-1]
        assert json.loads((ROOT / link).read_text())["n"] == int(n)
    study = json.loads(next((ROOT / "profiling/results").glob("study-stop-gr*.json")).read_text())
    trained, without = (row["knn_top1"]["mean"] for row in study["rows"])
    untrained = study["rows"][0]["knn_top1_untrained"]["mean"]
    assert f"| {untrained:.1f}, {trained:.1f}, {without:.1f} % |" in table


def test_pictures_are_drawn_again_by_the_command_that_readme_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "profiling" / "pictures.py"), run_name="__main__")
    for file in map(Path, json.loads(capsys.readouterr().out)["files"]):
        kept = ROOT / "docs" / "images" / file.name
        assert abs(file.stat().st_size - kept.stat().st_size) < 0.2 * kept.stat().st_size


def test_the_walkthroughs_figures_are_those_of_its_results():
    text = (ROOT / "docs" / "train-on-your-images.md").read_text()
    kept = ROOT / "profiling" / "results"
    (run,) = json.loads(next(kept.glob("train-on-your-images_*.json")).read_text())["runs"]
    for step, top1 in run["result"]["knn_by_step"].items():
        assert f"  step {step}  kNN top-1 {top1:.2f} %" in text
    assert f"took {run['result']['train_s']:.0f} s of training" in text
    command = re.sub(r" \\\n\s+", " ", text)
    for word in run["command"].split():
        assert word in command
    top1 = json.loads(next(kept.glob("classify-digits_*.json")).read_text())["top1"]
    for name in ("trained", "random"):
        cells = [f"{top1[f'{name}, {labels} a class']:.1f} %" for labels in (5, 20, 100)]
        assert f" | {' | '.join(cells)} |" in text
    slow = json.loads(next(kept.glob("classify-digits-simsiam_*.json")).read_text())["top1"]
    values = [f"{slow[f'trained, {labels} a class']:.1f}" for labels in (5, 20, 100)]
    assert "{}, {} and {} %".format(*values) in text


def test_the_walkthroughs_few_labels_and_features_are_those_of_its_results():
    text = (ROOT / "docs" / "train-on-your-images.md").read_text()
    kept, one_line = ROOT / "profiling" / "results", re.sub(r" \\\n\s+", " ", text)

    def recorded(name: str) -> dict:
        (run,) = json.loads(next(kept.glob(f"{name}_*.json")).read_text())["runs"]
        return run

    evaluated = recorded("few-labels-digits")["result"]
    for few in evaluated["few_labels"]:
        share = f"{100 * few['fraction']:g} % of the labels ({few['labels']}), {few['draws']} draws"
        top1 = few["top1"]
        assert re.search(rf"{re.escape(share)} +{top1['mean']:.2f} \+- {top1['std']:.2f} %", text)
    fast = evaluated["fast_probe"]
    assert re.search(rf"learning rate {fast['lr']} +{fast['top1']:.2f} %", text)
    training, features = recorded("train-photos"), recorded("features-photos")
    assert training["command"] in one_line and features["command"] in one_line
    found = features["result"]
    assert f"took {found['seconds']:.0f} s and printed" in text
    assert (
        f"{found['exact_duplicates']} images are exact copies of others, and "
        f"{found['near_duplicates']} pairs are near duplicates (cosine above 0.99)"
    ) in text
    assert f"features.npy ({found['images']} x {found['dimension']}), names.txt" in text
    assert found["step"] == training["result"]["steps"]
    assert "trained on them for seven minutes" in re.sub(r"\s+", " ", text)
    assert round(training["result"]["train_s"] / 60) == 7


def test_the_classifier_of_the_walkthrough_learns_from_an_exported_encoder(
    tmp_path, monkeypatch, capsys
):
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torchvision = import_torchvision()
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    about = {"arch": "resnet18", "stem": "cifar"}
    save_file(weights, tmp_path / "e.safetensors", about)
    for part in ("train", "val"):
        for number, color in enumerate(((250, 20, 20), (20, 20, 250))):
            folder = tmp_path / part / str(number)
            folder.mkdir(parents=True)
            for index in range(4):
                picture = Image.new("RGB", (8, 8), tuple(c + index for c in color))
                picture.save(folder / f"{index}.png")
    script = ROOT / "docs" / "examples" / "classify.py"
    arguments = [tmp_path / "e.safetensors", tmp_path, "--size", 8, "--labels", 2, "--seeds", 1]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    top1 = json.loads(capsys.readouterr().out)["top1"]
    assert top1 == {"trained, 2 a class": 100.0, "random, 2 a class": 100.0}
