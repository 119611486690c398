"""Processes that differ are refused with one line that names the host; equal ones are not."""

import json
import threading

import pytest
import torch.distributed as dist

from measure.harness import MeasureConfig
from train.config import Config, DataConfig
from train.distributed import agreement
from train.distributed.agreement import agree, disagreement, process_facts, small_shm

CONFIG = Config(data=DataConfig(root="digits"))


def four(**changed) -> list[dict]:
    """The facts of four hosts, the third with some changed."""
    own = process_facts(CONFIG, "cpu")
    everyone = [own | {"host": f"node{n}", "shm": 1 << 30} for n in range(4)]
    everyone[2] |= changed
    return everyone


def test_equal_hosts_agree_and_facts_survive_json():
    assert disagreement(four()) is None and small_shm(four()) is None
    assert json.loads(json.dumps(four())) == four()


def test_every_source_file_and_flag_counts_but_out():
    own = process_facts(CONFIG, "cpu")
    assert {"train/main.py", "train/methods/simsiam.py", "kernels/choose.py"} <= own["file"].keys()
    assert own["flag"]["--optim.lr"] == "0.05" and own["flag"]["--timeout_s"] == "60.0"
    assert "--out" not in own["flag"]


def test_a_programs_own_flags_count_but_save_beside_those_of_the_run():
    def facts(**given) -> dict:
        return process_facts(CONFIG, "cpu", options=MeasureConfig(**given)) | {"shm": 1 << 30}

    assert facts()["flag"]["--steps"] == "0" and facts()["flag"]["--epochs"] == "100"
    assert disagreement([facts(save="a"), facts(save="b")]) is None
    assert "--steps is 3 on host" in (disagreement([facts(), facts(steps=3)]) or "")


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        ("file", "train/loop.py", "same revision"), ("flag", "--optim.lr", "same flags"),
        ("package", "torch", "same version"), ("device", "the device", "driver"),
    ],
)  # fmt: skip
def test_what_differs_on_one_host_is_named_with_host_and_remedy(kind, name, remedy):
    odd = {**four()[0][kind], name: "odd"}
    line = disagreement(four(**{kind: odd}))
    assert line is not None and f"{name} is odd on host node2" in line and remedy in line
    missing = {key: value for key, value in odd.items() if key != name}
    assert f"{name} is missing on host node2" in (disagreement(four(**{kind: missing})) or "")


def test_the_odd_one_of_four_is_named_even_if_it_is_rank_0():
    everyone = four()
    everyone[0] = everyone[0] | {"flag": {**everyone[0]["flag"], "--seed": "1"}}
    assert "--seed is 1 on host node0 and 0 on host node1" in (disagreement(everyone) or "")


def test_a_host_that_cannot_run_says_why():
    assert disagreement(four(fault="no GPU")) == "host node2: no GPU"


def test_a_mistake_in_flags_names_its_host_unless_all_made_it_or_a_file_explains_it():
    assert disagreement(four(mistake="--x is unknown")) == "host node2: --x is unknown"
    assert (
        disagreement([rank | {"mistake": "--x is unknown"} for rank in four()]) == "--x is unknown"
    )
    odd = {**four()[0]["file"], "train/config/schema.py": "odd"}
    line = disagreement(four(mistake="--x is unknown", file=odd, flag={}, device={}))
    assert line is not None and line.startswith("train/config/schema.py is odd on host node2")


def test_a_small_shm_is_named_with_the_remedy():
    line = small_shm(four(shm=1 << 20))
    assert line is not None and "/dev/shm on host node2 has 1 MiB free" in line and "--shm" in line


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_small_shm_is_refused_where_nccl_needs_it_and_warned_of_elsewhere(monkeypatch, device):
    monkeypatch.setattr(agreement, "SHARED_MEMORY", 1 << 60)
    store = dist.HashStore()
    mine = process_facts(CONFIG, device)
    if device == "cpu":
        assert "/dev/shm" in (agree(store, mine, rank=0, size=1) or "")
    else:
        with pytest.raises(ValueError, match="/dev/shm"):
            agree(store, mine, rank=0, size=1)


def test_ranks_wait_for_one_another():
    store = dist.HashStore()
    mine = process_facts(CONFIG, "cpu")
    done = []
    others = [
        threading.Thread(target=lambda r=r: done.append(agree(store, mine, rank=r, size=3)))
        for r in (1, 2)
    ]
    others[0].start()
    others[0].join(0.1)
    assert done == []
    others[1].start()
    agree(store, mine, rank=0, size=3)
    for other in others:
        other.join(10)
    assert done == [None, None]
