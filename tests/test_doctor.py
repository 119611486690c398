"""The doctor: each fault is made, and its line names the remedy; ranks and hosts are named."""

import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import machine
from train import doctor, main
from train.distributed import rank_rates, startup
from train.doctor import Finding
from train.run import versions

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def run(command: list[str], **environment: str) -> tuple[subprocess.CompletedProcess, dict]:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return done, json.loads(done.stdout.splitlines()[-1])


def failed(told: dict) -> dict[str, dict]:
    return {check["name"]: check for check in told["checks"] if check["ok"] is False}


@pytest.mark.parametrize(
    ("driver_cuda", "torch_cuda", "dali_major", "driver_says", "dali_says"),
    [
        (13000, "13.0", 13, None, None),
        (12020, "12.9", 12, None, None),  # a CUDA 12 program runs on every CUDA 12 driver
        (13010, "12.9", 12, None, None),
        (12040, "13.0", 13, "release 580 or newer", "release 580 or newer"),
        (12040, "13.0", 12, "a torch built for CUDA 12", "pip install nvidia-dali-cuda130"),
        (13000, "13.0", 12, None, "pip uninstall nvidia-dali-cuda120, then pip install"),
        (13000, "12.9", 13, None, "pip install nvidia-dali-cuda120"),
        (12080, "12.8", 13, None, "release 580 or newer"),
        (11080, "12.8", 12, "release 525 or newer", "release 525 or newer"),
        (13000, None, 12, None, None),  # a CPU build of torch does not meet DALI's CUDA
        (None, "13.0", 12, None, None),
    ],
)
def test_driver_torch_and_dali_that_do_not_fit_are_told(
    monkeypatch, driver_cuda, torch_cuda, dali_major, driver_says, dali_says
):
    monkeypatch.setattr(versions, "driver_cuda", lambda: driver_cuda)
    monkeypatch.setattr(versions, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(machine, "dali_version", lambda: ("2.4.0", dali_major))
    for finding, says in ((versions.driver(), driver_says), (versions.dali(), dali_says)):
        assert (finding.ok is False) == (says is not None), finding
        assert says is None or says in finding.remedy


def test_the_installed_dali_is_named_by_its_wheel():
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert versions.dali().found.replace(" ", "==") in installed.splitlines()


def test_training_is_refused_where_the_driver_is_too_old_for_torch(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(versions, "driver_cuda", lambda: 12040)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["main.py", "--data.root=digits", f"--out={out}"])
    with pytest.raises(SystemExit) as stop:
        main.main.__wrapped__()  # without torch's @record, which wants a real stderr
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and not out.exists()
    assert "CUDA 12.4, but torch" in line and "580" in line and "--device cpu" in line


def test_gpus_that_the_environment_hides_are_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "driver_cuda", lambda: 13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.cuda(CPU).ok is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("no GPU")))
    assert doctor.cuda(CPU).ok is False


def test_a_gpu_that_the_container_was_not_given_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "driver_cuda", lambda: None)
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x040300\n")  # the sound part of a card
    assert not versions.has_nvidia_gpu(tmp_path)
    (card / "class").write_text("0x030200\n")
    assert versions.has_nvidia_gpu(tmp_path)
    monkeypatch.setattr(versions, "has_nvidia_gpu", lambda: True)
    finding = versions.driver()
    assert finding.ok is False and "docker run --gpus all" in finding.remedy


def test_a_kernel_that_does_not_compile_or_computes_something_else_is_told(monkeypatch):
    assert doctor.compiles_and_agrees(CPU).ok  # in Triton's interpreter
    from kernels.gpu import normalize as normalize_triton

    right = normalize_triton.normalize
    monkeypatch.setattr(normalize_triton, "normalize", lambda *args: right(*args) + 1)
    finding = doctor.compiles_and_agrees(CPU)
    assert finding.ok is False and "not close" in finding.found

    def fail(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(normalize_triton, "normalize", fail)
    finding = doctor.compiles_and_agrees(CPU)
    assert finding.ok is False and "gcc" in finding.remedy
    assert finding.found.endswith("Failed to find C compiler. Please specify via CC")


def test_pypis_apex_and_one_without_extensions_are_told(monkeypatch):
    assert doctor.apex().ok  # none is needed
    monkeypatch.setattr(doctor, "why_no_apex", lambda: "the installed apex 0.9 is not NVIDIA's")
    assert doctor.apex()[1:] == (
        False,
        "the installed apex 0.9 is not NVIDIA's",
        "pip uninstall apex",
    )
    monkeypatch.setattr(doctor, "why_no_apex", lambda: None)
    assert doctor.apex().ok is False and "APEX_CUDA_EXT=1" in doctor.apex().remedy


def test_a_small_shared_memory_is_told_where_nccl_needs_it():
    code = (
        "import json, torch; from train import doctor; "
        "print(json.dumps([doctor.shared_memory(torch.device(d)) for d in ('cuda', 'cpu')]))"
    )
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec"
    isolated = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*isolated, f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount here")
    done, (cuda, cpu) = run([*isolated, f'{mount} {sys.executable} -c "{code}"'])
    assert cuda[1] is False and cuda[2].startswith("64 MiB free") and "--shm-size" in cuda[3]
    assert cpu[1] is True


def test_a_low_limit_of_open_files_gets_a_remedy_that_the_hard_limit_allows(monkeypatch):
    for hard, remedy in ((1_048_576, "ulimit -n 65536 "), (4096, "ulimit -n 4096 "),
                         (1024, "raise the hard limit of 1024")):  # fmt: skip
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda _, most=hard: (1024, most))
        assert doctor.open_files(32).remedy.startswith(remedy)
    assert doctor.open_files(8).ok


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_test_of_no_time_is_refused(seconds, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", f"--seconds={seconds}"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    assert stopped.value.code == 2
    assert "--seconds must be above 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver would answer")
def test_faults_fail_the_program_with_plain_lines(tmp_path):
    """A driver of torch's CUDA, or beside a CPU build of torch, and a low limit of open files."""
    version = torch.version.cuda or "12.4"
    major, minor = map(int, version.split("."))
    compiler = shutil.which("cc") or shutil.which("c++")
    assert compiler, "a C++ compiler is among this project's needs"
    subprocess.run(
        [compiler, "-xc", "-", "-shared", "-o", str(tmp_path / "libcuda.so.1")],
        input=f"int cuDriverGetVersion(int *v) {{ *v = {1000 * major + 10 * minor}; return 0; }}",
        text=True, check=True,
    )  # fmt: skip
    words = "train/doctor.py --device cpu --seconds 0.2"
    done, told = run(
        ["sh", "-c", f"ulimit -n 512 && exec {sys.executable} {words}"],
        LD_LIBRARY_PATH=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1 and told["ok"] is False
    found = {name: told["checks"][0][name] for name in ("name", "ok", "found")}
    assert found == {"name": "driver", "ok": True, "found": f"supports CUDA {version}"}
    has_cpu_build = torch.version.cuda is None
    assert set(failed(told)) - {"DALI"} == (
        {"open files", "CUDA"} if has_cpu_build else {"open files"}
    )
    limit, *cuda = (line for line in done.stderr.splitlines()[::-1] if line.startswith("FAIL"))
    assert "limit 512, 1 ranks need 1024 -> raise the hard limit of 512, in" in limit
    assert not has_cpu_build or "a CPU build beside a driver -> pip install a CUDA" in cuda[0]
    assert "\x1b" not in done.stderr
    assert told["ranks"][0]["decode_images_per_s"] > 0


@pytest.mark.dist
def test_under_torchrun_all_ranks_are_measured_and_the_faulty_host_is_named():
    rank = f"hostname=$(hostname); [ $RANK = 1 ] && ulimit -n 512; exec {sys.executable}"
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--no-python", "sh", "-c", f"{rank} train/doctor.py --device cpu --seconds 0.4",
    ]  # fmt: skip
    done, told = run(launch)
    assert done.returncode == 1
    limits = [check["ok"] for check in told["checks"] if check["name"] == "open files"]
    assert sorted(limits) == [False, True]  # each thing found has its own line
    assert len(told["ranks"]) == 2
    for rate in told["ranks"]:
        assert set(rate) == {
            "host", "decode_images_per_s", "all_reduce_gb_per_s", "link_gb_per_s"
        }  # fmt: skip
        assert all(value > 0 for name, value in rate.items() if name != "host")
    assert "over 2 ranks, slowest rank" in done.stderr


def test_a_rank_that_finds_no_others_says_so():
    done, told = run(
        [sys.executable, "train/doctor.py", "--device", "cpu"], RANK="0", WORLD_SIZE="2"
    )
    assert done.returncode == 1 and set(failed(told)) == {"ranks"}


def test_a_port_that_another_program_has_fails_in_the_doctors_own_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--device", "cpu"])
    monkeypatch.setattr(startup, "read_ranks", lambda: (0, 2, 0, 2))
    for name in ("WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(SystemExit, match="True"):
            doctor.main()
    assert "cannot open port" in json.loads(capsys.readouterr().out)["checks"][-1]["found"]


def rates(decode: list[float], link: list[float]) -> list[dict[str, float]]:
    return [
        {"decode_images_per_s": d, "all_reduce_gb_per_s": 1.0, "link_gb_per_s": s}
        for d, s in zip(decode, link, strict=True)
    ]


def test_a_slow_link_is_named_among_its_kind():
    hosts = ["a", "a", "b", "b"]
    even = rates([100] * 4, [50, 1.1, 48, 1.0])  # links 1 and 3 cross the network
    links, decoding = rank_rates.judge(even, hosts)
    assert links[1] is True and decoding[1] is True
    assert "slowest link rank 3 on b to rank 0 on a: 1.00 GB/s" in links[2]
    links, _ = rank_rates.judge(rates([100] * 4, [50, 1.1, 10, 1.0]), hosts)
    assert links[1] is False and links[3].startswith("rank 2 on b sent at less than half")


def test_a_rank_that_decodes_slowly_is_named():
    _, (name, ok, found, remedy) = rank_rates.judge(
        rates([100, 110, 40, 105], [1] * 4), ["a", "b", "c", "d"]
    )
    assert (name, ok) == ("decode", False) and "355 images/s" in found
    assert "slowest rank 2 on c: 40" in found and "cores" in remedy


def test_lines_have_colour_on_a_terminal_and_name_the_hosts_that_differ(monkeypatch):
    good, bad = Finding("open files", True, "limit 65536"), Finding("open files", False, "limit 9")
    primary, secondary = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with open(secondary, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        rows = doctor.report([[good], [bad], [good]], ["a", "b", "c"])
        text = b""
        while text.count(b"\n") < 2:
            text += os.read(primary, 4096)
    os.close(primary)
    lines = text.decode().splitlines()
    assert "\x1b[32mok" in lines[0] and "a, c: limit 65536" in lines[0]
    assert "\x1b[1;31mFAIL" in lines[1] and "b: limit 9" in lines[1]
    assert [row["hosts"] for row in rows] == [["a", "c"], ["b"]]


def test_what_dalis_pipelines_hold_on_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr("pipeline.loader.usable_cores", lambda: 6)
    found = doctor.dali_memory(torch.device("cuda", 0))
    assert found.ok and found.found == (
        "training 1.75 GiB of device memory, 1.75 GiB pinned (6 threads); evaluation none"
    )
    assert doctor.dali_memory(torch.device("cpu")).ok is None
