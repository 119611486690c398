"""The stages of the GPU suite in the order of what they show, with what each needs and costs.

The seconds are estimates for an H100 with 16 cores, compiling included; no GPU has been held for
them yet. profiling/gpu_suite.py takes the first that is not done, fits, and has what it needs.
Goals in images/s are for an H200 alone; shares of the roofline and of the copy's bandwidth, both
measured in the same run, hold on any card.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from predict.limit import GPUS, count
from suite.checks import TINY, TINY_STEPS, StageFailed, Suite
from train.config import MethodConfig, ModelConfig

H200_GOAL, H200_MARK = 3200, 4000  # images/s of the step
CIFAR10_EPOCHS = 200
LIGHTLY_KNN = 76.4  # lightly's benchmark: CIFAR-10, ResNet-18, 200 epochs, batch 512
HEAVY_SITES = 5  # the slowest shapes, which the goal of 80 % of the copy bandwidth is for
STEPS = ("--steps=20", "--warmup=10", "--repeats=3")


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the seconds that it is expected to take, and its needs."""

    run: Callable[[Suite], None]
    seconds: float
    needs: tuple[str, ...] = ()
    """Of "dali", "imagenet", "cifar10"."""
    takes_the_rest: bool = False
    """Its training stops at the end of the minutes and is resumed by the next call."""


def throughput(s: Suite, name: str, what: str, *flags: str) -> dict:
    """A part of profiling/throughput.py on the photos."""
    images = f"--data.root={s.folder('imagenet', 'photos')}"
    line = ("profiling/throughput.py", images, f"--what={what}", *flags)
    return s.run(name, *line, tiny=TINY_STEPS)


@cache
def share_of_h200(images_per_s: float) -> float:
    """What share of an H200's roofline a rate of the step is: the goal on every card."""
    counts = count(ModelConfig(), MethodConfig(), images=256, size=224)
    return round(images_per_s * counts.seconds(*GPUS["h200"]) / counts.images, 3)


def kernels(s: Suite) -> None:
    """Every kernel once at a real shape, against its plain twin."""
    line, tiny = ("profiling/kernels.py", "--each-once=real"), ("--each-once=small",)
    result = s.run("each-once", *line, tiny=tiny, interpret=True, judges=True)
    s.check("kernels that ran", len(result["kernels"]))
    s.check("kernels that are wrong or did not run", len(result["failed"]), at_most=0)
    s.check("largest error by the allowed one", result["max_error_by_allowed"], at_most=1)


def demo(s: Suite) -> None:
    """train/main.py from the start to SIGTERM, and the same command to the end."""
    out = s.out / "runs" / "demo"
    command = ("train/main.py", "--config=configs/demo.yaml", f"--out={out}", "--log_every=20")
    tiny = (*TINY, "--max_steps=60", "--log_every=2")
    metrics = out / "metrics.jsonl"

    def has_trained() -> bool:
        return metrics.exists() and "train/loss" in metrics.read_text()

    if not (out / "checkpoints").exists():  # else an earlier call was cut off after it
        result = s.run("stopped", *command, tiny=tiny, until=has_trained)
        if result["state"] != "preempted":
            raise StageFailed(f"SIGTERM left the demo {result['state']}, not preempted")
        s.check("demo: steps when stopped", result["steps"])
    result = s.run("resumed", *command, tiny=tiny)
    s.check("demo: finished after it was resumed", result["state"] == "finished", at_least=1)
    s.check("demo: steps", result["steps"])
    gain = result["knn_top1"] - result["knn_top1_untrained"]
    s.check("demo: points of kNN top-1 over untrained", gain, at_least=20)


def doctor(s: Suite) -> None:
    """What the machine has: driver, CUDA, DALI, Triton, decoders."""
    result = s.run("doctor", "train/doctor.py", judges=True)
    failed = [row["name"] for row in result["checks"] if row["ok"] is False]
    s.check("doctor: checks that failed", len(failed), at_most=0)


def step(s: Suite) -> None:
    """Our training step against its roofline; and where its time is spent."""
    result = throughput(s, "step", "step,limit,ranks", "--peers=false", *STEPS)
    rate, limit = result["images_per_s"]["step"], result["limit"]
    is_h200 = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    s.check("step [images/s]", rate, **({"at_least": H200_GOAL} if is_h200 else {}))
    goal, mark = share_of_h200(H200_GOAL), share_of_h200(H200_MARK)
    s.check("share of the roofline", limit.get("share_of_roofline"), at_least=goal)
    s.check(f"share of the roofline by the mark of {mark:g}", limit["share_of_roofline"] / mark)
    s.check("MFU", limit.get("mfu"))
    s.check("copy [GB/s]", limit["copy_gb_per_s"])
    s.check("matmul [TFLOP/s]", limit["matmul_tflop_per_s"])
    check_memory(s, result, "torch_active_gib", "dali_and_contexts_gib", form="memory: {}")


def check_memory(s: Suite, result: dict, *names: str, form: str) -> None:
    """Report what a GPU's process held; a CPU's has none of it."""
    for name in names:
        if name in result["memory"]:
            s.check(form.format(name), result["memory"][name])


def step_peers(s: Suite) -> None:
    """The step beside eager bf16, compiled plain and the official one, taking turns."""
    ratios = throughput(s, "peers", "step", *STEPS)["ratios"]
    s.check("step against eager_bf16", ratios.get("step/eager_bf16"))
    s.check("step against compiled_plain", ratios.get("step/compiled_plain"), at_least=1.05)
    s.check("step against official", ratios.get("step/official"), at_least=3.0)


def launches(s: Suite) -> None:
    """Kernels of the compiled step by the profiler, beside what profiling/compiled.py counts."""
    if s.rehearse:
        s.found["not rehearsed"] = "it profiles a GPU's kernels"
        return
    both = s.run("launches", "profiling/launches.py")["beside_compiled"] or {}
    s.check("launches of the compiled graphs", both.get("launches"))
    s.check("launches as counted", both.get("launches_counted"))
    for name, rate in both.get("gb_per_s", {}).items():
        s.check(f"counted bytes over the profiler's time, {name} [GB/s]", rate)


def sites(s: Suite) -> None:
    """Each kernel's site against its peers and the bandwidth of a copy."""
    tiny = ("--compile-only", "--images=2")
    result = s.run("sites", "profiling/kernels.py", "--n=15", tiny=tiny)
    if "sites" in result:  # a rehearsal compiles alone
        judge_sites(s, result)


def judge_sites(s: Suite, result: dict) -> None:
    """What profiling/kernels.py measured, against the goals."""
    s.check("copy [GB/s]", result["copy_gb_per_s"])
    rows = sorted(result["sites"], key=lambda row: -row["count"] * sum(row["ours_ms"]))
    worst = min(min(row["share_of_copy"]) for row in rows[:HEAVY_SITES])
    s.check(f"share of copy bandwidth, {HEAVY_SITES} heaviest shapes", worst, at_least=0.8)
    for peer, goal in (("eager_bf16", 2.0), ("eager_fp16", 1.25), ("compiled_plain", 1.1)):
        s.check(f"{peer}/ours, sum of sites", result["ratios"].get(f"{peer}/ours"), at_least=goal)
    slower = sum(sum(row.get("compiled_plain_ms", [1e9])) < sum(row["ours_ms"]) for row in rows)
    s.check("sites where the compiled plain module is faster", slower, at_most=0)
    loss_us = sum(result["loss_us"]["ours"])
    s.check("loss at 512 x 2048, forward and backward [us]", loss_us, at_most=15)
    s.check("colours and normalisation of 512 views [ms]", result["views_ms"]["ours"], at_most=0.5)


def views(s: Suite) -> None:
    """DALI's GPU views against those of the CPU, odd images, memory over epochs."""
    s.pytest("views", "tests/test_gpu.py", "-m", "gpu")


def loader(s: Suite) -> None:
    """DALI on the GPU: decode once against twice, and against torchvision."""
    result = throughput(s, "loader", "loader", "--repeats=2", "--loader_images=4096")
    s.check("loader [images/s]", result["images_per_s"]["loader"])
    ratios = result["ratios"]
    s.check("against DALI as in NVIDIA's examples", ratios.get("loader/dali_example"))
    s.check("against torchvision's DataLoader", ratios.get("loader/torchvision"))


def end_to_end(s: Suite) -> None:
    """Loader and step together on the photos."""
    flags = ("--peers=false", *STEPS, "--loader_images=4096")
    result = throughput(s, "end-to-end", "loader,step,end_to_end", *flags)
    rates, ratio = result["images_per_s"], result["ratios"].get("end_to_end/slower")
    s.check("end to end / the slower of the two", ratio, at_least=0.95)
    s.check("loader / step", rates["loader"] / rates["step"], at_least=1.3)
    s.check("data wait [%]", result["end_to_end"].get("data_wait_pct"))


def training(s: Suite, name: str, *flags: str) -> dict:
    """A piece of a training of the CIFAR-10 recipe in OUT/runs/<name>, resumed if begun."""
    out = s.out / "runs" / name
    out.parent.mkdir(exist_ok=True)
    where = (f"--data.root={s.folder('cifar10', 'digits')}", f"--out={out}")
    line = ("train/main.py", "--config=configs/cifar10.yaml", *where, "--checkpoint_every=200")
    tiny = (*TINY, "--precision=fp32", "--max_steps=6", "--log_every=2")
    return s.run(name, *line, *flags, saves=True, tiny=tiny)


def cifar10(s: Suite) -> None:
    """A piece of 200 epochs; the goal is judged once they are done."""
    result = training(s, "cifar10", f"--epochs={CIFAR10_EPOCHS}", "--eval.every_epochs=10")
    goal = {"at_least": LIGHTLY_KNN} if result["state"] == "finished" else {}
    s.check("steps done", result["steps"])
    s.check("CIFAR-10 [images/s]", result["images_per_s"])
    s.check("minutes trained", result["train_s"] / 60)
    s.check("kNN top-1 [%]", result["knn_top1"], **goal)


STAGES = {
    "kernels": Stage(kernels, 45),
    "demo": Stage(demo, 60, ("dali",)),
    "doctor": Stage(doctor, 20, ("dali",)),
    "step": Stage(step, 110),
    "step-peers": Stage(step_peers, 150),
    "launches": Stage(launches, 40),
    "sites": Stage(sites, 120),
    "views": Stage(views, 45, ("dali",)),
    "loader": Stage(loader, 40, ("dali", "imagenet")),
    "end-to-end": Stage(end_to_end, 70, ("dali", "imagenet")),
    "cifar10": Stage(cifar10, 60, ("dali", "cifar10"), takes_the_rest=True),
}
