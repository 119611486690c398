"""Stages of the GPU suite that run only when named: `gpu_suite.py OUT --stages memcheck,variants`.

What a machine that is held for longer can show. profiling/suite/stages.py has what is always taken.
A newcomer's mistake: naming them in the first quarter of an hour. They take it whole.
"""

import shutil
import subprocess
import sys

from suite.checks import TINY_STEPS, StageFailed, Suite, last_line
from suite.stages import Stage, throughput, training

KERNEL_TESTS = ("norm_kernels", "loss_kernels", "cosine", "two_views")


def kernel_tests(s: Suite) -> None:
    """The kernels for real, not interpreted: every dtype, odd shapes, compiled."""
    s.pytest("kernels", *(f"tests/test_{name}.py" for name in KERNEL_TESTS))


def memcheck(s: Suite) -> None:
    """compute-sanitizer's memcheck over every kernel at small odd shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not s.rehearse:
        raise StageFailed("no compute-sanitizer on PATH: it comes with the CUDA toolkit")
    wrapper = () if tool is None else (tool, "--tool", "memcheck", "--error-exitcode", "9")
    s.run("memcheck", "profiling/kernels.py", "--each-once=small", wrapper=wrapper,
          interpret=True)  # fmt: skip


def variants(s: Suite) -> None:
    """What a switch costs or gains, each alone."""
    for name, flags in {
        "plain": ["--model.kernels=plain"], "recompute": ["--model.recompute=true"],
        "batch-64": ["--data.batch_size=64"], "batch-512": ["--data.batch_size=512"],
        "fp16": ["--precision=fp16"],
    }.items():  # fmt: skip
        if s.rehearse and name == "recompute":
            continue  # refused on a CPU
        found = throughput(s, name, "step", "--peers=false", *flags)
        s.check(f"step with {name} [images/s]", found["images_per_s"]["step"])
        for key in ("torch_active_gib", "torch_reserved_gib"):
            if key in found["memory"]:
                s.check(f"{key} with {name}", found["memory"][key])


def trace(s: Suite) -> None:
    """A profiler's trace of the step, for ui.perfetto.dev."""
    s.run("trace", "profiling/trace.py", f"--data.root={s.imagenet}",
          f"--out={s.out / 'trace.json.gz'}", tiny=TINY_STEPS)  # fmt: skip


def decoder_load(s: Suite) -> None:
    """Shares of the JPEGs given to the hardware decoder."""
    for share in (0.0, 0.5, 0.65, 0.8, 0.9, 0.99):
        found = throughput(
            s, f"load-{share}", "loader", "--peers=false", f"--dali.hw_decoder_load={share}"
        )
        s.check(f"loader with load {share} [images/s]", found["images_per_s"]["loader"])


def growth(s: Suite) -> None:
    """Cost against size, and memory over three epochs."""
    if s.rehearse:
        s.found["not rehearsed"] = "it links 1.28 million files"
        return
    found = s.run("growth", "profiling/growth.py", f"--data.root={s.imagenet}")
    s.check("host memory growth over three epochs", found["memory_growth"], at_most=0.05)
    for part in ("images", "batch"):
        slowest = found[f"{part}_slowest_by_fastest"]
        s.check(f"slowest by fastest over sizes: {part}", slowest, at_most=1.15)


def precision(s: Suite) -> None:
    """Three epochs each of bf16, fp16, TF32 and plain fp32, two seeds: loss and kNN."""
    for seed in (0, 1):
        for name, flags in {
            "bf16": ["--precision=bf16"], "fp16": ["--precision=fp16"],
            "tf32": ["--precision=tf32"], "plain": ["--precision=fp32", "--model.kernels=plain"],
        }.items():  # fmt: skip
            found = training(s, f"{name}-{seed}", *flags, f"--seed={seed}", "--epochs=3",
                             "--eval.every_epochs=3")  # fmt: skip
            s.check(f"{name}, seed {seed}: kNN top-1 [%]", found["knn_top1"])
            s.check(f"{name}, seed {seed}: loss", found["loss"])


def resume(s: Suite) -> None:
    """Twelve steps straight on against six, a stop, and six: the largest gap of a weight."""
    from safetensors.torch import load_file

    kept = {}
    for name, stops in (("straight", [6]), ("again", [6]), ("resumed", [3, 6])):
        for stop in stops:
            training(s, name, "--epochs=1", "--eval.k=5", f"--max_steps={stop}")
        (folder,) = (s.out / "runs" / name / "checkpoints").glob("step-*6")
        kept[name] = load_file(folder / "model.safetensors")
    for name in ("again", "resumed"):
        gap = max(
            (kept[name][key].double() - value.double()).abs().max().item()
            for key, value in kept["straight"].items()
        )
        s.check(f"largest gap of a weight, {name} against straight", gap)


def apex(s: Suite) -> None:
    """NVIDIA's apex, built from --apex DIR: its SGD against torch's; sites has its norm."""
    if s.rehearse:
        s.found["not rehearsed"] = "it builds CUDA code"
        return
    if s.apex is None:
        raise StageFailed("apex was not built: give --apex DIR with a checkout of NVIDIA/apex")
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-index", "--no-deps",
        "--config-settings=--build-option=--cpp_ext", "--config-settings=--build-option=--cuda_ext",
        "--config-settings=--build-option=--bnp", str(s.apex),
    ]  # fmt: skip
    log = s.out / "apex-build.log"
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if code:
        raise StageFailed(f"apex could not be built: {last_line(log)}")
    for name in ("torch", "apex"):
        found = throughput(s, f"sgd-{name}", "step", "--peers=false",
                           f"--optim.implementation={name}")  # fmt: skip
        s.check(f"step with {name}'s SGD [images/s]", found["images_per_s"]["step"])


EXTRAS = {
    "memcheck": Stage(memcheck, 120),
    "kernel-tests": Stage(kernel_tests, 400),
    "variants": Stage(variants, 400),
    "trace": Stage(trace, 90, ("dali", "imagenet")),
    "decoder-load": Stage(decoder_load, 200, ("dali", "imagenet")),
    "growth": Stage(growth, 400, ("dali", "imagenet")),
    "precision": Stage(precision, 450, ("dali", "cifar10")),
    "resume": Stage(resume, 150, ("dali", "cifar10")),
    "apex": Stage(apex, 450),
}
