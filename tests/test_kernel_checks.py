"""`profiling/kernels.py --each-once` launches every Triton kernel and tells a wrong one."""

import json
import sys

import pytest
import torch

from measure import kernel_checks
from measure.kernel_checks import CASES, SHAPES, Draw, check_each, errors_of, jit_functions, reached

CPU = torch.device("cpu")


CHOICES = {"SHORTCUT": [0, 1, 2], "VIEWS": [2], "MASK": [0, 1, 2], "CHANNELS": [3, 4, 8]}


@pytest.fixture(scope="module")
def found() -> dict:
    return check_each("small", torch.float32, CPU)


def test_every_kernel_of_kernels_is_launched_and_as_exact_as_plain_torch(found):
    assert found["failed"] == [] and 0 < found["max_error_by_allowed"] <= 1
    assert found["kernels"] and set(found["kernels"]) < set(jit_functions())


def test_every_switch_of_a_kernel_is_on_once_and_off_once(found):
    for kernel, switches in found["kernels"].items():
        for name, values in switches.items():
            wanted = CHOICES.get(name, [0, 1])
            if (kernel, name) == ("_backward", "MASK"):
                wanted = [0, 2]  # the bits were used by the pass before
            if (kernel, name) == ("_apply_pool", "AFFINE"):
                wanted = [1]  # the stem's batch norm is affine
            assert values == wanted, (kernel, name)


def test_a_kernel_that_no_case_launches_fails_the_check(monkeypatch):
    monkeypatch.setitem(kernel_checks.SHAPES, "small", {"loss": (2, 7, 5)})
    failed = check_each("small", torch.float32, CPU)["failed"]
    assert "_normalize was not launched" in failed and "_reduce was not launched" in failed
    assert not [line for line in failed if "losses" in line]


def test_what_a_launched_kernel_calls_counts_as_launched():
    assert reached({"_reduce"}) == {"_reduce", "place", "load_bits", "affine", "pooled_gradient"}


def test_a_wrong_result_is_told_with_its_error(monkeypatch):
    case = CASES["sync"]("sync", (4, 8, 3, 3), Draw(torch.float32, CPU))
    good = errors_of(case, {})["mean"]
    call = case.call
    case.call = lambda given, how: {k: v + 0.01 * (how == "triton") for k, v in
                                    call(given, how).items()}  # fmt: skip
    wrong = errors_of(case, {})["mean"]
    assert good[0] <= good[2] and wrong[0] > 0.009 > wrong[2]
    monkeypatch.setitem(CASES, "sync", lambda *_: case)
    monkeypatch.setitem(SHAPES, "small", {"sync": (4, 8, 3, 3)})
    assert "sync: mean is off by 0.01, allowed" in " ".join(
        check_each("small", torch.float32, CPU)["failed"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_real_shapes_are_refused_in_the_interpreter(monkeypatch, capsys):
    import kernels.gpu.launch  # the package: profiling/kernels.py has its name

    assert kernels.gpu.launch.INTERPRETED
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("kernels_program", "profiling/kernels.py")
    program = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_program", program)
    spec.loader.exec_module(program)
    with pytest.raises(SystemExit):
        program.check("real", torch.bfloat16)
    assert "--each-once real takes hours in Triton's interpreter" in capsys.readouterr().err
    monkeypatch.setattr(program, "check_each", lambda *_: {"failed": ["x is off"]})
    with pytest.raises(SystemExit) as stop:
        program.check("small", torch.bfloat16)
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failed": ["x is off"]}
