"""Output that cannot be written: a terminal that closes, a reader that ends, a full disk."""

import errno
import io
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from pipeline.streams import CLOSED, Output, print_result, write_error
from test_layout import SCRIPTS
from test_train import TINY
from train.distributed import StopSignal, World
from train.pilots.workers import Workers
from train.run.folder import Log, Metrics, read_metrics
from train.run.report import print_on_stderr

ROOT = Path(__file__).parent.parent
ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
TRAIN = [*TINY, "--eval.rank_images=0", "--log_every=1"]


def stream_to(descriptor: int) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(Output(descriptor))
    return io.TextIOWrapper(buffered, "utf-8", "backslashreplace", line_buffering=True)


@contextmanager
def without_reader() -> Iterator[io.TextIOWrapper]:
    """A stream whose reader has ended, as stdout and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = stream_to(writer)
    with redirect_stdout(stream), redirect_stderr(stream):
        yield stream
    os.close(writer)


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def test_a_stream_without_a_reader_takes_every_write_and_keeps_the_first_error():
    with without_reader() as gone:
        assert write_error(gone) is None
        print("a line")
        error = write_error(gone)
        assert error is not None and error.errno == errno.EPIPE
        print_on_stderr("a line")
        gone.flush()  # as Python does at the end
        assert write_error(gone) is error


def test_lines_are_written_at_once_under_python_u_as_torchrun_starts_ranks():
    code = "import os, sys; from pipeline.streams import protect_output as p; print('old'); p(); "
    code += "print('new'); print('said', file=sys.stderr); os._exit(0)"
    words = [sys.executable, "-u", "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("old\nnew\n", "said\n")


def test_a_pipe_that_another_process_made_non_blocking_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream, text = stream_to(writer), "0123456789" * 20_000  # more than a pipe holds
    received = bytearray()

    def read() -> None:
        while len(received) < len(text):
            received.extend(os.read(reader, 4096))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stream.write(text)
    stream.flush()
    thread.join(60)
    assert received.decode() == text and write_error(stream) is None
    os.close(reader)
    os.close(writer)


def test_the_log_file_says_once_that_stderr_is_gone_and_has_all_lines(tmp_path):
    with without_reader():
        log = Log(tmp_path / "log.txt")
        for line in "first", "second":
            log(line)
    lines = [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [lines[0], *lines[2:]] == ["first", "second"]
    assert lines[1].startswith("warning: stderr cannot be written (Broken pipe), the terminal may")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_is_received_where_its_line_cannot_be_printed(number):
    stop = StopSignal(ALONE)
    try:
        with without_reader():
            signal.raise_signal(number)
        assert stop.agreed()
    finally:
        stop.close()


def test_a_second_sigterm_leaves_the_save_alone_and_a_second_ctrl_c_exits_at_once():
    stop = StopSignal(ALONE)
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()


def test_a_terminal_that_closes_stops_no_program_under_nohup_but_the_ranks_of_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(ALONE)
        signal.raise_signal(signal.SIGHUP)
        assert not stop.agreed()
        stop.close()
        monkeypatch.setenv("WORLD_SIZE", "1")
        stop = StopSignal(ALONE)
        signal.raise_signal(signal.SIGHUP)
        assert stop.agreed()
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def hangup_of_worker(_trial: object) -> object:
    return signal.getsignal(signal.SIGHUP)


def test_the_workers_of_a_pilot_outlive_the_terminal_to_save():
    from train.studies.runs import plan_places

    before = signal.getsignal(signal.SIGHUP)
    with Workers(plan_places(1, with_gpus=False)) as pool:
        ((_, handler),) = pool.map(hangup_of_worker, ["a trial"])
    assert handler == signal.SIG_IGN and signal.getsignal(signal.SIGHUP) == before


def test_a_result_that_stdout_does_not_take_is_an_error_only_where_no_file_has_it(
    monkeypatch, capsys
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", stream_to(full.fileno()))
        print_result({"loss": -1.0}, kept=Path("RUN/result.json"))
        with pytest.raises(SystemExit) as ended:
            print_result({"loss": -1.0})
    assert ended.value.code == 1
    lost = "stdout cannot be written (No space left on device)"
    lines = [f"warning: {lost}: the result is in RUN/result.json", f"error: {lost}"]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_program_protects_its_output_before_anything_else(script):
    assert (ROOT / script).read_text().endswith("    protect_output()\n    main()\n")


def test_no_file_of_a_program_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    code = (
        "import os, sys; import torch.utils.tensorboard, nvidia.dali\n"
        "import train.main, train.doctor, train.pilot, train.study\n"  # what keeps files open?
        "free = [n for n in range(3) if not os.path.exists(f'/proc/self/fd/{n}')]\n"
        "from pipeline.streams import protect_output, write_error\n"
        "protect_output()\n"
        f"file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "print('stray'), print('stray', file=sys.stderr), os.write(1, b'stray')\n"
        "assert (free, file.fileno() > 2, write_error(sys.stdout).errno) == ([0, 1, 2], True, 9)\n"
        "os.system('echo stray; echo stray >&2')\n"
        "file.write('data')"
    )
    words = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    done = subprocess.run(words, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0 and (tmp_path / "data").read_text() == "data"
    assert CLOSED.errno == errno.EBADF


def test_print_config_fails_where_stdout_is_full_and_doctor_says_its_verdict_all_the_same(tmp_path):
    full = 'exec "$0" "$@" >/dev/full'
    words = ["sh", "-c", full, sys.executable, "train/main.py", "--data.root=x", "--print_config"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    line = "error: stdout cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, line)
    words = ["sh", "-c", f"{full} 2>&1", sys.executable, "train/doctor.py"]
    words += ["--device=cpu", "--seconds=0.1"]
    assert subprocess.run(words, cwd=ROOT, timeout=120, check=False).returncode == 0


def test_of_several_ranks_the_first_alone_prints_the_config():
    words = [sys.executable, "train/main.py", "--data.root=x", "--print_config"]
    for rank in "01":
        env = os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and ("root: x" in done.stdout) == (rank == "0")


def test_under_an_ascii_locale_names_of_any_alphabet_are_written(tiny_images, tmp_path):
    root = tmp_path / "Bilder \u65e5\u672c"
    shutil.copytree(tiny_images, root)
    (root / sorted(p.name for p in root.iterdir())[0] / "\u00e4.jpg").write_bytes(b"no image")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "train/main.py", *TINY, f"--data.root={root}", f"--out={tmp_path}/run"]
    words += ["--data.max_bad_fraction=0.1"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "\u00e4.jpg" in (tmp_path / "run/log.txt").read_text("utf-8")


def test_packing_into_a_pipe_that_nobody_reads_makes_all_shards(tiny_images, tmp_path):
    words = ["sh", "-c", 'exec "$0" "$@" 2>/dev/full >&2', sys.executable, "pipeline/pack.py"]
    words += [str(tiny_images), str(tmp_path / "packed")]
    done = subprocess.run(words, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0 and (tmp_path / "packed" / "images-000000.tar").exists()


@pytest.mark.parametrize("num_bytes", [0, 200])
def test_tensorboard_on_a_full_disk_ends_with_one_line_of_the_log(tmp_path, num_bytes, monkeypatch):
    lines: list[str] = []
    log, before = Log(None), threading.enumerate()
    monkeypatch.setattr(log, "warn", lines.append)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # of its writing thread
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))  # writing fails: EFBIG
    try:
        metrics = Metrics(tmp_path, step=0, log=log)
        metrics.path = None
        for step in range(20):
            metrics.scalars(step, {"train/loss": -0.5})
        metrics.close()
        for thread in threading.enumerate():
            if thread not in before:
                thread.join(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = lines
    assert line.startswith("TensorBoard stopped: [Errno 27]") and "Training continues" in line


def test_a_tensorboard_folder_that_is_removed_ends_no_training(tmp_path, monkeypatch):
    lines: list[str] = []
    log, before = Log(None), threading.enumerate()
    monkeypatch.setattr(log, "warn", lines.append)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # of its writing thread
    metrics = Metrics(tmp_path, step=0, log=log)
    metrics.scalars(1, {"train/loss": -0.5})
    shutil.rmtree(tmp_path / "tb")
    for step in range(2, 20):
        metrics.scalars(step, {"train/loss": -0.5})
    metrics.close()
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(60)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 20))
    (line,) = lines
    assert line.startswith("TensorBoard stopped: ") and "Training continues" in line


@pytest.mark.dist
def test_a_training_whose_terminal_closes_saves_and_says_so_in_its_log(tiny_images, tmp_path):
    out, (terminal, its) = tmp_path / "run", pty.openpty()
    words = [sys.executable, "train/main.py", f"--data.root={tiny_images}", f"--out={out}", *TRAIN]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    process = subprocess.Popen([*words, "--epochs=100000"], cwd=ROOT, **streams)
    os.close(its)
    try:
        until = time.monotonic() + 120
        while not any("train/loss" in row for row in read_metrics(out / "metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < until
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 65536)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # as the kernel does
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
    step = status(out)["step"]
    assert status(out) == {"state": "preempted", "step": step} and step > 0
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    told = (out / "log.txt").read_text()
    assert told.count("stderr cannot be written (Input/output error)") == 1


@pytest.mark.dist
def test_a_training_that_can_write_no_line_and_no_picture_is_finished(tiny_images, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "curves.png").symlink_to("/dev/full")
    words = [sys.executable, "train/main.py", f"--data.root={tiny_images}", f"--out={out}"]
    reader, gone = os.pipe()
    os.close(reader)
    with open(gone, "w") as pipe:
        done = subprocess.run(
            [*words, *TRAIN, "--max_steps=2"], cwd=ROOT, stdout=pipe, stderr=pipe, timeout=120,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert status(out) == {"state": "finished", "step": 2}
    told = (out / "log.txt").read_text()
    assert told.count("stderr cannot be written (Broken pipe)") == 1
    assert told.count("curves.png was not drawn: [Errno 28]") == 1
