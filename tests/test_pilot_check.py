"""profiling/pilot_check.py: the comparison of the pilot's judgement with kNN."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
before = list(sys.path)
check = runpy.run_path(str(ROOT / "profiling" / "pilot_check.py"))
patches = runpy.run_path(str(ROOT / "profiling" / "patches.py"))
sys.path[:] = before  # the scripts put their root first, in place of tests/


def row(lr: float, knn: float, **measures: float | None) -> dict:
    """A setting's judgement."""
    known = dict.fromkeys(check["MEASURES"], None) | {"score": 0.0, "early_score": knn}
    setting = {"lr": lr, "crop": 0.2, "color": 1.0}
    return {"setting": setting, "knn": knn, "collapsed": False, **known, **measures}


def test_correlation_is_of_ranks_and_a_measure_that_a_diverged_setting_lacks_leaves_it_out():
    rows = [row(0.1, 40.0, score=30.0, decay=1.0), row(0.2, 30.0, score=29.0, decay=1.5)]
    rows += [row(0.4, 20.0, score=1.0, decay=9.0), row(0.8, 10.0, score=0.5)]
    found = check["compare"](rows, rows[2]["setting"], rows[1]["setting"])
    assert found["correlation"]["score"] == pytest.approx(1)
    assert found["correlation"]["decay"] == pytest.approx(1)  # less is better, of the three
    assert found["correlation_early_score"] == pytest.approx(1)
    assert found["correlation"]["rank_z"] == 0  # nobody has one
    assert (found["knn_best"], found["knn_chosen"], found["knn_preset"]) == (40, 30, 20)
    assert check["compare"](rows, rows[0]["setting"], None)["knn_chosen"] is None


def test_patches_are_cut_from_the_centre_and_gray_ones_have_the_contrast_asked_for():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    colored = patches["cut"](photo, 3, None)
    assert len(colored) == 9 and {patch.shape for patch in colored} == {(32, 32, 3)}
    square = np.asarray(photo.crop((50, 0, 250, 200)).resize((96, 96), Image.Resampling.LANCZOS))
    assert (colored[5] == square[32:64, 64:]).all()
    for patch in patches["cut"](photo, 3, 0.05):
        assert patch.shape == (32, 32) and patch.mean() == pytest.approx(127.5, abs=1)
        assert patch.std() / 255 == pytest.approx(0.05, abs=0.003)


@pytest.mark.slow
def test_all_settings_are_trained_to_the_end_and_the_same_command_repeats_the_result(tmp_path):
    words = [sys.executable, "profiling/pilot_check.py", "--data.root=digits", "--minutes=0.6"]
    words += ["--settings=4", "--model.width=8", "--device=cpu", f"--out={tmp_path}/pilot"]

    def run() -> dict:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    found = run()
    assert found["n"] == 4 and len({row["step"] for row in found["settings"]}) == 1
    assert all(-1 <= value <= 1 for value in found["correlation"].values())
    assert found["knn_best"] == max(row["knn"] for row in found["settings"])
    assert found["knn_best"] >= found["knn_preset"] > 20
    assert run()["settings"] == found["settings"]
