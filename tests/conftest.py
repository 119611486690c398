"""Fixtures, and the switch that runs Triton kernels in its interpreter where there is no GPU."""

import faulthandler
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key

if torch.cuda.is_available():  # no digit may hang on what cuDNN and cuBLAS choose
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when they are loaded
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns until it is told
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any kernel

os.environ["PYTHONFAULTHANDLER"] = "1"  # for the processes that tests start: tests/limits.py
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup, which they would inherit
    signal.signal(signal.SIGHUP, lambda *_: None)  # a handler is not inherited

from PIL import Image
from sklearn.datasets import load_sample_images

from launched import LAUNCH, launched, weights
from limits import limited
from measure.peers import import_torchvision
from stand_ins.cluster import Cluster, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take a process for minutes come first: last, they would run alone."""
    items.sort(key=lambda item: item.path.stem not in ("test_compiled_step", "test_train"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the process where the test takes too long; pytest alone prints the stacks.

    pytest 9 has a setting for it, which an older one, as in NVIDIA's image, refuses.
    """
    faulthandler.dump_traceback_later(
        float(item.config.getini("faulthandler_timeout")), exit=True,
        file=item.config.stash[fault_handler_stderr_fd_key],
    )  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test, or its module's fixture, whose processes hang fails with their stacks."""
    with limited(float(item.config.getini("faulthandler_timeout"))):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def interpreter_that_rounds():
    """Triton's interpreter (3.9) cuts fp32 off to bf16, and multiplies bf16 as integers in tl.dot.

    Every GPU rounds to nearest, and multiplies floats.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value, source, target, mode):
        if str(source) == "fp32" and str(target) == "bf16":
            as_torch = torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
            return as_torch.view(torch.int16).numpy().view(np.uint16)
        return convert(value, source, target, mode)

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(handle):
        if str(handle.dtype.scalar) != "bf16":
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def dot_of_floats(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(builder, "create_dot", dot_of_floats)
        yield


@pytest.fixture(scope="session")
def torchvision():
    """The peer."""
    return import_torchvision()


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Real photos (scikit-learn's china.jpg and flower.jpg), whole and cut: (H, W, 3) uint8."""
    whole = [np.asarray(image) for image in load_sample_images().images]
    cuts = [image[y : y + 300, x : x + 260] for image in whole for y in (0, 120) for x in (0, 300)]
    return [np.ascontiguousarray(image) for image in [*whole, *cuts]]


@pytest.fixture(scope="session")
def jpegs(photos) -> list[np.ndarray]:
    """The photos as JPEG files."""
    files = []
    for photo in photos:
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=92)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return files


@pytest.fixture(scope="module")
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """Makes clusters of so many hosts; they are taken down after the module."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with ExitStack() as made:
        yield lambda num_hosts: made.enter_context(Cluster(num_hosts))


@pytest.fixture(scope="session")
def cut_pictures(tmp_path_factory, photos) -> Callable[[int], Path]:
    """Makes a folder of so many pictures of 40 x 40 pixels, cut from the photos, in two classes."""

    def cut(count: int) -> Path:
        root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
        for number in range(count):
            photo, label = photos[number % 2], ("china", "flower")[number % 2]
            y, x = rng.integers(photo.shape[0] - 40), rng.integers(photo.shape[1] - 40)
            (root / label).mkdir(exist_ok=True)
            Image.fromarray(photo[y : y + 40, x : x + 40]).save(root / label / f"{number:02d}.jpg")
        return root

    return cut


@pytest.fixture(scope="module")
def images(cut_pictures) -> Path:
    """96 small real pictures, for a module that may change the folder."""
    return cut_pictures(96)


@pytest.fixture(scope="session")
def tiny_images(cut_pictures) -> Path:
    """48 of them, for tests that leave the folder as it is."""
    return cut_pictures(48)


@pytest.fixture(scope="module")
def two(clusters) -> Cluster:
    """Two hosts."""
    return clusters(2)


@pytest.fixture(scope="module")
def undisturbed(two, tiny_images, tmp_path_factory) -> dict:
    """The weights of a run on two hosts that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = launched(two, folder, LAUNCH, f"--data.root={tiny_images}", nodes=2)
    assert run.succeed()["steps"] == 12
    return weights(run.out)
