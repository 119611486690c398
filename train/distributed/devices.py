"""The device of this process, and how it computes: threads, memory, streams, TF32."""

import ctypes
import os

import torch

from pipeline.machine import usable_cores
from train.network.model import Precision, set_tf32

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def take_device(
    device: str, local_rank: int, local_size: int, precision: Precision = "fp32"
) -> torch.device:
    """This process's GPU, or the CPU with its share of the cores, computing in a precision.

    Raises: ValueError where there are no GPUs, or fewer than processes, or for tf32 without one.
    """
    kind = resolve_device(device)
    set_tf32(precision, torch.device(kind))
    if kind == "cpu":
        torch.set_num_threads(max(1, usable_cores() // local_size))
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes on this machine but {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    take_high_priority()
    torch.backends.cudnn.benchmark = True  # shapes never change: the search is paid once
    return torch.device("cuda", local_rank)


def take_high_priority() -> None:
    """Put all of this process's work on one stream that the device prefers to DALI's.

    DALI's streams have priority 0, the lowest, and its flag for another has no effect (DALI 2.4,
    Pipeline.default_cuda_stream_priority). The stream is current from the start, for model and DDP
    too: nothing needs to wait for the default stream. NCCL's streams then get the highest priority,
    or the step would starve the gradients' all-reduce (initNCCLComm of ProcessGroupNCCL.cpp).
    """
    torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
    os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"  # read when a communicator is made


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step, as PyTorch does on a GPU.

    A step frees its activations and allocates them again; by default glibc returns large blocks to
    the kernel, which clears each page once more. Figures in profiling/LOG.md.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in other C libraries
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for --device. Raises: ValueError for cuda where there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, but torch {torch.__version__} finds no CUDA device: "
            "python train/doctor.py says why; or use --device cpu"
        )
    return device
