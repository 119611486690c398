"""Everything that only a GPU can show, in stages: `python profiling/gpu_suite.py OUT`.

    python profiling/gpu_suite.py OUT --images DIR           all stages, then the table
    python profiling/gpu_suite.py OUT --stages step,loader   some; the table shows all of OUT
    python profiling/gpu_suite.py OUT --rehearse             the same commands, tiny, on any machine

DIR holds cifar10/ (train/ and test/ with class folders) and imagenet/ (photos). Each stage takes
less than eight minutes, writes OUT/<stage>.json and its programs' output as OUT/<stage>-*.log, and
one that fails does not stop the next. Long trainings stop by SIGTERM at the limit and go on where
they were when their stage is named again. Exit code 1 where a goal was missed or a stage failed.
Not yet run on a GPU.
A newcomer's mistake: reading a rehearsal's figures. It shows that the commands run, no more.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.cli import refuse

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 470.0  # of a stage
TO_SAVE_S = 60.0  # for a training to write its checkpoint and result after SIGTERM
CIFAR10_EPOCHS = 200
LIGHTLY_KNN = 76.4  # lightly's benchmark: CIFAR-10, ResNet-18, 200 epochs, batch 512
HEAVY_SITES = 5  # the slowest shapes, which the goal of 80 % of the copy bandwidth is for
KERNEL_TESTS = ("norm_kernels", "loss_kernels", "cosine", "two_views")
TINY = [
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--augment.size=16",
    "--data.batch_size=16", "--eval.size=16", "--eval.resize=16", "--eval.k=5",
]  # fmt: skip


class StageFailed(Exception):
    """A program of a stage did not end well; the first line says why."""


@dataclass
class Check:
    """A figure against its goal; without one it is only told."""

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """pass, fail, or "" where there is no goal; a figure that is missing fails its goal."""
        if self.at_least is None and self.at_most is None:
            return ""
        if self.value is None:
            return "fail"
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return "pass" if low <= self.value <= high else "fail"

    @property
    def goal(self) -> str:
        """The goal in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"


@dataclass
class Suite:
    """Where results go, where images are, and the clock of the stage that runs."""

    out: Path
    images: Path
    rehearse: bool
    apex: Path | None
    stage: str = ""
    deadline: float = 0.0
    found: dict = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def imagenet(self) -> str:
        """The folder of photos; profiling's embedded ones in a rehearsal."""
        return "photos" if self.rehearse else str(self.images / "imagenet")

    @property
    def cifar10(self) -> str:
        """The folder of CIFAR-10; the embedded digits in a rehearsal."""
        return "digits" if self.rehearse else str(self.images / "cifar10")

    def check(self, what: str, value: float | None, **goal: float) -> None:
        """Note a figure; goal: at_least or at_most. A rehearsal has none."""
        self.checks.append(Check(what, value, **({} if self.rehearse else goal)))

    def run(self, name: str, *command: str, ends_itself: bool = True) -> dict:
        """A program's last stdout line as JSON, kept under `name`. Raises: StageFailed.

        At the limit a training (ends_itself False) gets SIGTERM, on which it saves; others are
        killed. Output goes to OUT/<stage>-<name>.log.
        """
        log = self.out / f"{self.stage}-{name}.log"
        left = self.deadline - time.monotonic()
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip
            try:
                stdout, _ = process.communicate(timeout=left if ends_itself else left - TO_SAVE_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL if ends_itself else signal.SIGTERM)
                try:
                    stdout, _ = process.communicate(timeout=TO_SAVE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    stdout, _ = process.communicate()
                if ends_itself:
                    raise StageFailed(f"{name} took longer than {left:.0f} s: {log}") from None
        complaint = last_line(log)
        with log.open("a") as file:
            file.write(stdout)
        if process.returncode:
            raise StageFailed(f"{name} ended with {process.returncode}: {complaint}")
        try:
            result = json.loads(stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise StageFailed(f"{name} printed no JSON line at its end: {log}") from None
        self.found[name] = result
        return result

    def pytest(self, name: str, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        """Tests as a check: how many did not pass. Raises: StageFailed if none ran."""
        log = self.out / f"{self.stage}-{name}.log"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit2",
                   f"--junitxml={log.with_suffix('.xml')}", *arguments]  # fmt: skip
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False,
                    timeout=self.deadline - time.monotonic(),
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise StageFailed(f"{name} took longer than the stage may: {log}") from None
        counts = count_tests(log.with_suffix(".xml"))
        self.found[name] = counts | {"exit_code": code}
        if counts["ran"] == 0 and not self.rehearse:
            raise StageFailed(f"{name}: no test ran: {last_line(log)}")
        self.check(f"{name}: tests that ran", counts["ran"])
        self.check(f"{name}: tests that failed", counts["failed"], at_most=0)
        self.check(f"{name}: exit code", code, at_most=0)


def count_tests(report: Path) -> dict[str, int]:
    """Tests that ran and that failed, of pytest's XML report (written by pytest: trusted)."""
    import xml.etree.ElementTree as ET

    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped, failures, errors = (
        int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors")
    )
    return {"ran": total - skipped, "failed": failures + errors, "skipped": skipped}


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "nothing was printed")


def throughput(s: Suite, name: str, what: str, *flags: str) -> dict:
    """A part of profiling/throughput.py on the photos."""
    size = [*TINY, "--repeats=1", "--loader_images=32", "--precision=fp32"] if s.rehearse else []
    return s.run(
        name, "profiling/throughput.py", f"--data.root={s.imagenet}", f"--what={what}", *size,
        *flags,
    )  # fmt: skip


def training(s: Suite, name: str, *flags: str) -> dict:
    """A piece of a training of the CIFAR-10 recipe in OUT/runs/<name>, gone on with if begun."""
    out = s.out / "runs" / name
    out.parent.mkdir(exist_ok=True)
    tiny = [*TINY, "--max_steps=6", "--log_every=2"] if s.rehearse else []
    return s.run(
        name, "train/main.py", "--config=configs/cifar10.yaml", f"--data.root={s.cifar10}",
        f"--out={out}", "--checkpoint_every=200", *flags, *tiny, ends_itself=False,
    )  # fmt: skip


def machine(s: Suite) -> None:
    """What there is: versions, driver, DALI, apex."""
    found = s.run("doctor", "train/doctor.py")
    s.check("checks of the doctor that failed", found.get("failed"), at_most=0)


def kernel_tests(s: Suite) -> None:
    """The kernels for real, not interpreted, and what needs a CUDA device."""
    s.pytest("kernels", *(f"tests/test_{name}.py" for name in KERNEL_TESTS))
    s.pytest("gpu", "-m", "gpu")


def sanitizer(s: Suite) -> None:
    """compute-sanitizer's memcheck over the kernels' tests of one shape each."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not s.rehearse:
        raise StageFailed("no compute-sanitizer on PATH: it comes with the CUDA toolkit")
    wrapper = (tool, "--tool", "memcheck", "--error-exitcode", "9") if tool else ()
    s.pytest("memcheck", "tests/test_loss_kernels.py", "-x", wrapper=wrapper)


def kernel_times(s: Suite) -> None:
    """Each site against its peers and the bandwidth of a copy."""
    if s.rehearse:
        s.run("compile", "profiling/kernels.py", "--compile-only", "--images", "2")
        return
    found = s.run("sites", "profiling/kernels.py")
    rows = sorted(found["sites"], key=lambda row: -row["count"] * sum(row["ours_ms"]))
    worst = min(min(row["share_of_copy"]) for row in rows[:HEAVY_SITES])
    s.check(f"share of copy bandwidth, {HEAVY_SITES} heaviest shapes", worst, at_least=0.8)
    for peer, goal in (("eager_bf16", 2.0), ("eager_fp16", 1.25), ("compiled_plain", 1.1)):
        s.check(f"{peer}/ours, sum of sites", found["ratios"].get(f"{peer}/ours"), at_least=goal)
    slower = sum(sum(row["compiled_plain_ms"]) < sum(row["ours_ms"]) for row in rows)
    s.check("sites where the compiled plain module is faster", slower, at_most=0)
    s.check("loss at 512 x 2048, forward and backward [us]", sum(found["loss_us"]["ours"]),
            at_most=15)  # fmt: skip


def step(s: Suite) -> None:
    """The training step against its peers and the roofline."""
    found = throughput(s, "step", "step,limit,ranks")
    ratios = found["ratios"]
    s.check("step [images/s]", found["images_per_s"]["step"], at_least=3200)
    s.check("step against the official one", ratios.get("step/official"), at_least=3.0)
    s.check("step against the compiled plain one", ratios.get("step/compiled_plain"), at_least=1.05)
    s.check("step against eager bf16", ratios.get("step/eager_bf16"))
    s.check("share of the roofline", found["limit"].get("share_of_roofline"))
    s.check("MFU", found["limit"].get("mfu"))


def step_variants(s: Suite) -> None:
    """What a switch costs or gains, each alone."""
    variants = {
        "plain": ["--model.kernels=plain"],
        "recompute": [] if s.rehearse else ["--model.recompute=true"],
        "batch-64": [] if s.rehearse else ["--data.batch_size=64"],
        "batch-512": [] if s.rehearse else ["--data.batch_size=512"],
        "fp16": [] if s.rehearse else ["--precision=fp16"],
    }
    for name, flags in variants.items():
        found = throughput(s, name, "step", "--peers=false", *flags)
        s.check(f"step with {name} [images/s]", found["images_per_s"]["step"])
        for key in ("torch_active_gib", "torch_reserved_gib"):
            if key in found["memory"]:
                s.check(f"{key} with {name}", found["memory"][key])


def trace(s: Suite) -> None:
    """A profiler's trace of the step, for ui.perfetto.dev."""
    size = [*TINY, "--precision=fp32"] if s.rehearse else []
    s.run("trace", "profiling/trace.py", f"--data.root={s.imagenet}",
          f"--out={s.out / 'trace.json.gz'}", *size)  # fmt: skip


def loader(s: Suite) -> None:
    """DALI on the GPU: decode once against twice, and against torchvision."""
    found = throughput(s, "loader", "loader")
    s.check("loader [images/s]", found["images_per_s"]["loader"])
    s.check("against DALI as in NVIDIA's examples", found["ratios"].get("loader/dali_example"))
    s.check("against torchvision's DataLoader", found["ratios"].get("loader/torchvision"))


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


def end_to_end(s: Suite) -> None:
    """Loader and step together on the photos."""
    found = throughput(s, "end-to-end", "loader,step,end_to_end", "--peers=false")
    s.check("end to end / the slower of the two", found["ratios"].get("end_to_end/slower"),
            at_least=0.95)  # fmt: skip
    rates = found["images_per_s"]
    s.check("loader / step", rates["loader"] / rates["step"], at_least=1.3)
    s.check("data wait [%]", found["end_to_end"].get("data_wait_pct"))


def cifar10(s: Suite) -> None:
    """A piece of 200 epochs; the goal is judged once they are done."""
    found = training(s, "cifar10", f"--epochs={CIFAR10_EPOCHS}", "--eval.every_epochs=10")
    is_done = found["state"] == "finished" and not s.rehearse
    s.check("steps done", found["steps"])
    s.check("CIFAR-10 [images/s]", found["images_per_s"])
    s.check("minutes trained", found["train_s"] / 60)
    s.check("kNN top-1 [%]", found["knn_top1"], **({"at_least": LIGHTLY_KNN} if is_done else {}))


def precision(s: Suite) -> None:
    """Three epochs each of bf16, fp16, TF32 and plain fp32, two seeds: loss and kNN."""
    for seed in (0, 1):
        for name, flags in {
            "bf16": ["--precision=bf16"], "fp16": ["--precision=fp16"],
            "fp32": ["--precision=fp32"], "plain": ["--precision=fp32", "--model.kernels=plain"],
        }.items():  # fmt: skip
            flags = ["--precision=fp32", "--model.kernels=plain"] if s.rehearse else flags
            found = training(s, f"{name}-{seed}", *flags, f"--seed={seed}", "--epochs=3",
                             "--eval.every_epochs=3")  # fmt: skip
            s.check(f"{name}, seed {seed}: kNN top-1 [%]", found["knn_top1"])
            s.check(f"{name}, seed {seed}: loss", found["loss"])


def resume(s: Suite) -> None:
    """Twelve steps straight on against six, a stop, and six: the largest gap of a weight."""
    from safetensors.torch import load_file

    steps = 6 if s.rehearse else 12
    for name, stops in (
        ("straight", [steps]),
        ("again", [steps]),
        ("resumed", [steps // 2, steps]),
    ):
        for stop in stops:
            s.run(
                f"{name}-{stop}", "train/main.py", "--config=configs/cifar10.yaml",
                f"--data.root={s.cifar10}", f"--out={s.out / 'runs' / name}", "--epochs=1",
                *(TINY if s.rehearse else []), f"--max_steps={stop}", "--eval.k=5",
            )  # fmt: skip
    kept = {}
    for name in ("straight", "again", "resumed"):
        folder = s.out / "runs" / name / "checkpoints" / f"step-{steps:08d}"
        kept[name] = load_file(folder / "model.safetensors")
    for name in ("again", "resumed"):
        gap = max(
            (kept[name][key].double() - value.double()).abs().max().item()
            for key, value in kept["straight"].items()
        )
        s.check(f"largest gap of a weight, {name} against straight", gap)


def apex(s: Suite) -> None:
    """NVIDIA's apex, built from --apex DIR: its SGD against torch's; kernel times have its norm."""
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


STAGES: dict[str, Callable[[Suite], None]] = {
    "machine": machine, "kernel-tests": kernel_tests, "sanitizer": sanitizer,
    "kernel-times": kernel_times, "step": step, "step-variants": step_variants, "trace": trace,
    "loader": loader, "decoder-load": decoder_load, "growth": growth, "end-to-end": end_to_end,
    "cifar10": cifar10, "precision": precision, "resume": resume, "apex": apex,
}  # fmt: skip


def run_stage(name: str, suite: Suite) -> None:
    """Run a stage and write OUT/<stage>.json, whatever happens in it."""
    suite.stage, suite.deadline = name, time.monotonic() + LIMIT_S
    suite.found, suite.checks = {}, []
    begin, error = time.monotonic(), None
    try:
        STAGES[name](suite)
    except (StageFailed, OSError, KeyError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}" if isinstance(problem, KeyError) else str(
            problem)  # fmt: skip
    written = {
        "stage": name, "rehearsal": suite.rehearse, "seconds": round(time.monotonic() - begin, 1),
        "error": error, "found": suite.found,
        "checks": [asdict(c) | {"verdict": c.verdict, "goal": c.goal} for c in suite.checks],
    }  # fmt: skip
    (suite.out / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")


def summary(out: Path) -> dict:
    """All stages that OUT holds, in order, and what was missed."""
    stages = [
        json.loads(path.read_text()) for name in STAGES if (path := out / f"{name}.json").exists()
    ]
    missed = [f"{s['stage']}: {c['what']}" for s in stages for c in s["checks"]
              if c["verdict"] == "fail"]  # fmt: skip
    failed = {s["stage"]: s["error"] for s in stages if s["error"]}
    return {"stages": stages, "missed": missed, "failed": failed}


def print_table(stages: list[dict]) -> None:
    """The table for people, on stderr."""
    table = Table(title="GPU suite")
    for name in ("stage", "figure", "value", "goal", ""):
        table.add_column(name, justify="right" if name == "value" else "left")
    for stage in stages:
        title = f"{stage['stage']} ({stage['seconds']:.0f} s)"
        for check in stage["checks"]:
            value = "none" if check["value"] is None else f"{check['value']:.5g}"
            what = escape(check["what"])  # "[images/s]" is no markup
            table.add_row(title, what, value, check["goal"], check["verdict"])
            title = ""
        if stage["error"]:
            table.add_row(title, "failed", "", "", escape(stage["error"][:100]))
        table.add_section()
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def main() -> None:
    """Read the flags, run the stages, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Everything that only a GPU can show, in stages.")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--images", type=Path, help="folder with cifar10/ and imagenet/")
    parser.add_argument("--stages", default=",".join(STAGES), help="names between commas")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on any machine, no goals")
    parser.add_argument("--apex", type=Path, help="checkout of NVIDIA/apex to build")
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        refuse(f"--stages {unknown[0]} is unknown: there are {', '.join(STAGES)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        refuse("no CUDA device: give --rehearse to run the same commands, tiny", code=1)
    if not arguments.rehearse:
        for part in ("cifar10", "imagenet"):
            if arguments.images is None or not (arguments.images / part).is_dir():
                refuse(f"--images must name a folder that holds {part}/, got {arguments.images}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    suite = Suite(out, arguments.images or out, arguments.rehearse, arguments.apex)
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        run_stage(name, suite)
    found = summary(out)
    print_table(found["stages"])
    print(json.dumps({"out": str(out), "missed": found["missed"], "failed": found["failed"]}))
    if found["missed"] or found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
