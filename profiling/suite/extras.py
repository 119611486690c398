"""Stages of the GPU suite that run only when named: `gpu_suite.py OUT --stages memcheck,variants`.

What a machine that is held for longer can show: any of them takes a quarter of an hour or most of
it. profiling/suite/stages.py has what is always taken.
"""

import shutil
import subprocess
import sys

from suite.checks import TINY_STEPS, StageFailed, Suite, last_line
from suite.stages import Stage, check_memory, throughput, training

# the Makefile reads this line
KERNEL_TESTS = "norm_kernels norm_conv_kernels loss_kernels colors cosine two_views"


def kernel_tests(s: Suite) -> None:
    """The kernels for real, not interpreted: every dtype, odd shapes, compiled."""
    s.pytest("kernels", *(f"tests/test_{name}.py" for name in KERNEL_TESTS.split()))


def memcheck(s: Suite) -> None:
    """compute-sanitizer's memcheck over every kernel at small odd shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not s.rehearse:
        raise StageFailed("no compute-sanitizer on PATH: it comes with the CUDA toolkit")
    wrapper = () if tool is None else (tool, "--tool", "memcheck", "--error-exitcode", "9")
    line = ("profiling/kernels.py", "--each-once=small")
    s.run("memcheck", *line, wrapper=wrapper, interpret=True)


def variants(s: Suite) -> None:
    """What a switch costs or gains, each alone."""
    flags = {
        "plain": "--model.kernels=plain",
        "recompute": "--model.recompute=true",
        "conv_stats": "--model.conv_stats=true",
        "stem-4": "--model.stem_channels=4",
        "stem-8": "--model.stem_channels=8",
        "batch-64": "--data.batch_size=64",
        "batch-512": "--data.batch_size=512",
        "fp16": "--precision=fp16",
    }
    for name, flag in flags.items():
        if s.rehearse and name in ("recompute", "conv_stats"):
            continue  # refused on a CPU
        result = throughput(s, name, "step", "--peers=false", flag)
        s.check(f"step with {name} [images/s]", result["images_per_s"]["step"])
        form = f"{{}} with {name}"
        check_memory(s, result, "torch_active_gib", "torch_reserved_gib", form=form)


def trace(s: Suite) -> None:
    """A profiler's trace of the step, for ui.perfetto.dev."""
    images = f"--data.root={s.folder('imagenet', 'photos')}"
    out = f"--out={s.out / 'trace.json.gz'}"
    s.run("trace", "profiling/trace.py", images, out, tiny=TINY_STEPS)


def decoder_load(s: Suite) -> None:
    """Shares of the JPEGs given to the hardware decoder."""
    for share in (0.0, 0.5, 0.65, 0.8, 0.9, 0.99):
        flags = ("--peers=false", f"--dali.hw_decoder_load={share}")
        result = throughput(s, f"load-{share}", "loader", *flags)
        s.check(f"loader with load {share} [images/s]", result["images_per_s"]["loader"])


def growth(s: Suite) -> None:
    """Cost against size, and memory over three epochs."""
    if s.rehearse:
        s.found["not rehearsed"] = "it links 1.28 million files"
        return
    images = f"--data.root={s.folder('imagenet', 'photos')}"
    result = s.run("growth", "profiling/growth.py", images)
    s.check("host memory growth over three epochs", result["memory_growth"], at_most=0.05)
    for part in ("images", "batch"):
        slowest = result[f"{part}_slowest_by_fastest"]
        s.check(f"slowest by fastest over sizes: {part}", slowest, at_most=1.15)


def precision(s: Suite) -> None:
    """Three epochs each of bf16, fp16, TF32 and plain fp32, two seeds: loss and kNN."""
    for seed in (0, 1):
        for name in ("bf16", "fp16", "tf32", "plain"):
            flags = [f"--precision={name}"]
            if name == "plain":
                flags = ["--precision=fp32", "--model.kernels=plain"]
            flags += [f"--seed={seed}", "--epochs=3", "--eval.every_epochs=3"]
            result = training(s, f"{name}-{seed}", *flags)
            s.check(f"{name}, seed {seed}: kNN top-1 [%]", result["knn_top1"])
            s.check(f"{name}, seed {seed}: loss", result["loss"])


def resume(s: Suite) -> None:
    """Twelve steps straight on against six, a stop, and six: the largest gap of a weight."""
    from safetensors.torch import load_file

    weights = {}
    for name, stops in (("straight", [6]), ("again", [6]), ("resumed", [3, 6])):
        for stop in stops:
            training(s, name, "--epochs=1", "--eval.k=5", f"--max_steps={stop}")
        (folder,) = (s.out / "runs" / name / "checkpoints").glob("step-*6")
        weights[name] = load_file(folder / "model.safetensors")
    for name in ("again", "resumed"):
        pairs = ((weights[name][key], value) for key, value in weights["straight"].items())
        gap = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
        s.check(f"largest gap of a weight, {name} against straight", gap)


def apex(s: Suite) -> None:
    """NVIDIA's apex, built from --apex DIR: its SGD against torch's; sites has its norm."""
    if s.rehearse:
        s.found["not rehearsed"] = "it builds CUDA code"
        return
    if s.apex is None:
        raise StageFailed("apex was not built: give --apex DIR with a checkout of NVIDIA/apex")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-index"]
    parts = ("--cpp_ext", "--cuda_ext", "--bnp")
    command += [f"--config-settings=--build-option={part}" for part in parts]
    log = s.out / "apex-build.log"
    with log.open("w") as file:
        command += ["--no-deps", str(s.apex)]
        code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if code:
        raise StageFailed(f"apex could not be built: {last_line(log)}")
    for name in ("torch", "apex"):
        flags = ("--peers=false", f"--optim.implementation={name}")
        result = throughput(s, f"sgd-{name}", "step", *flags)
        s.check(f"step with {name}'s SGD [images/s]", result["images_per_s"]["step"])


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
