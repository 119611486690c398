"""fp32 is fp32: TF32 is off in convolutions and products unless --precision tf32 asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.distributed import devices, take_device
from train.network import model
from train.network.model import DTYPES, set_tf32

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def flags_as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def allowed() -> tuple[bool, bool, str]:
    """In products and in convolutions, and what Inductor asks for."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("name", DTYPES)
def test_only_tf32_rounds_what_is_multiplied(name):
    set_tf32(name, CUDA)
    assert allowed() == ((True, True, "high") if name == "tf32" else (False, False, "highest"))


def test_a_device_is_taken_with_torchs_default_switched_off(monkeypatch):
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: None)  # of this process too
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    take_device("cpu", 0, 1, "bf16")
    assert allowed() == (False, False, "highest")


def test_nvidias_image_does_not_make_fp32_products_tf32():
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n"
         "from train.network.model import set_tf32\n"
         "before = torch.backends.cuda.matmul.allow_tf32\n"
         "set_tf32('fp32', torch.device('cuda'))\n"
         "print(before, torch.backends.cuda.matmul.allow_tf32)"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="--precision tf32 needs a CUDA device: use .*fp32"):
        take_device("cpu", 0, 1, "tf32")


def test_autocast_leaves_tf32_and_fp32_alone():
    for name, dtype in DTYPES.items():
        with model.autocast(name, torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
