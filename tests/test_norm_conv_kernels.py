"""The Triton kernels of 1x1 convolutions that sum for batch norm, against fp64."""

import pytest
import torch

from kernels.batch_norm import Norm, NormOptions, batch_norm_act, conv_statistics
from kernels.gpu import launch
from measure.kernel_checks import CASES, Case, Draw, errors_of, norm_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = (4, 70, 5, 7)  # 70 channels: two tiles of inputs, the last with 6; 70 rows a view: two parts


def assert_as_exact_as_plain(case: Case) -> None:
    for name, (error, _, allowed) in errors_of(case, {}).items():
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["conv", "conv residual", "conv norm"])
def test_between_two_batch_norms_every_gradient_is_as_exact_as_plain_torch(kind, dtype):
    assert_as_exact_as_plain(CASES[kind](kind, ODD, Draw(dtype, DEVICE)))


def test_parts_of_several_tiles_are_as_exact_as_plain_torch(monkeypatch):
    monkeypatch.setattr(launch, "PRODUCT_PROGRAMS", 4)  # two parts of three tiles, the last short
    shape = (4, 24, 13, 14)
    assert launch.product(364, 24, 96, 2, widest=64)[0] == (1, 2, 2)
    assert_as_exact_as_plain(CASES["conv norm"]("conv norm", shape, Draw(torch.float32, DEVICE)))
    assert_as_exact_as_plain(CASES["conv"]("conv", shape, Draw(torch.float32, DEVICE)))


def first_case(offset: float, dtype: torch.dtype, num_views: int) -> Case:
    """A convolution that no batch norm comes before: of the stem's end."""
    draw = Draw(dtype, DEVICE)
    tensors = {"x": draw.laid_out(draw.normal(*ODD) + offset)}
    tensors["conv"] = draw.normal(130, ODD[1], 1, 1) / 8 + 1 / ODD[1]  # 130: two blocks

    def call(given, how):
        options, conv = NormOptions(num_views, kernels=how, relu=False), given["conv"]
        if how == "triton":
            z, part = conv_statistics(given["x"], conv, options)
        else:
            z, part = torch.nn.functional.conv2d(given["x"], conv.to(given["x"].dtype)), None
        after = norm_of({"x": z}, "")
        y = batch_norm_act(z, after, options, part=part)
        return {"y": y, "mean": after.running_mean, "var": after.running_var}

    return Case(tensors, call, [draw.laid_out(draw.normal(4, 130, 5, 7))])


@pytest.mark.parametrize(
    ("offset", "dtype", "num_views"),
    [
        *((0.0, dtype, 2) for dtype in DTYPES),
        (1000.0, torch.float32, 2),  # sums of squares would keep no digit of the variance
        (0.0, torch.float32, 1),
        (0.0, torch.float32, 4),
    ],
)
def test_after_the_stem_outputs_gradients_and_statistics_are_as_exact(offset, dtype, num_views):
    assert_as_exact_as_plain(first_case(offset, dtype, num_views))


def test_a_view_with_nan_leaves_the_statistics_of_the_other():
    x = torch.randn(4, 16, 3, 3).contiguous(memory_format=torch.channels_last).to(DEVICE)
    x[0, 2, 1, 1] = torch.nan
    options = NormOptions(2, kernels="triton")
    z, part = conv_statistics(x, torch.randn(16, 16, 1, 1, device=DEVICE), options)
    running = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    y = batch_norm_act(z, Norm(None, None, *running), options, part=part)
    assert y[:2].isnan().all() and not y[2:].isnan().any()
    assert (running[0] == 0).all() and (running[1] == 1).all()  # of a step that is skipped


def test_a_wrong_layout_is_refused():
    weight = torch.randn(3, 8, 1, 1)
    with pytest.raises(ValueError, match="channels_last"):
        conv_statistics(torch.randn(2, 8, 3, 3), weight)
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"\(D, C, 1, 1\)"):
        conv_statistics(x, torch.randn(3, 8, 3, 3))
