"""The Triton kernels of batch norm against fp64, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from kernels import batch_norm
from kernels.batch_norm import (
    Norm,
    NormOptions,
    batch_norm_act,
    batch_norm_act_conv,
    batch_norm_act_pool,
    block_end,
)
from kernels.gpu import launch
from kernels.norm_autograd import ConvOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS, MARGIN = 1e-5, 0.1
TRITON = NormOptions(kernels="triton")
TWO_VIEWS = NormOptions(2, kernels="triton")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def exact_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_views: int) -> Tensor:
    """Batch norm of each view by its formula, in x's dtype."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    parts = []
    for view in x.chunk(num_views):
        centred = view - view.mean(dims, keepdim=True)
        y = centred / (centred.square().mean(dims, keepdim=True) + EPS).sqrt()
        parts.append(y if weight is None else y * weight.view(shape) + bias.view(shape))
    return torch.cat(parts)


class Case:
    """Inputs, incoming gradients that are 0 where ReLU's kink is near, and three computations."""

    def __init__(self, shape, dtype, *, shortcut, relu=True, views=2, affine=True, offset=0.0):
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        channels = shape[1]
        self.shortcut, self.relu, self.views, self.affine = shortcut, relu, views, affine
        self.x = channels_last((draw(*shape) + offset).to(dtype))
        self.skip = channels_last(draw(*shape).to(dtype)) if shortcut != "none" else None
        self.params = [1 + 0.3 * draw(channels) for _ in range(4)] if affine else []
        with torch.no_grad():
            pre = self.formula([t.double() if t is not None else None for t in self.tensors])
            far = (pre.abs() > MARGIN) if relu else torch.ones_like(pre)
        self.grads = [channels_last((draw(*shape) * far).to(dtype)) for _ in range(2)]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.skip, *self.params]

    def formula(self, tensors) -> Tensor:
        """What is under the ReLU."""
        x, skip, *params = tensors
        weight, bias, weight2, bias2 = params or (None,) * 4
        y = exact_norm(x, weight, bias, self.views)
        if self.shortcut == "residual":
            y = y + skip
        elif self.shortcut == "norm":
            y = y + exact_norm(skip, weight2, bias2, self.views)
        return y

    def exact(self) -> dict[str, Tensor]:
        leaves = [t.detach().double().requires_grad_() if t is not None else None
                  for t in self.tensors]  # fmt: skip
        y = self.formula(leaves)
        y = y.relu() if self.relu else y
        dy = sum(g.double() for g in (self.grads if self.shortcut != "none" else self.grads[:1]))
        (y * dy).sum().backward()
        return self.named(y, leaves)

    def ours(self, kernels: str) -> dict[str, Tensor]:
        leaves = [t.detach().to(DEVICE).requires_grad_() if t is not None else None
                  for t in self.tensors]  # fmt: skip
        x, skip, *params = leaves
        weight, bias, weight2, bias2 = params or (None,) * 4
        running = [
            torch.full((x.shape[1],), value, device=DEVICE) for value in (0.0, 1.0, 0.0, 1.0)
        ]
        norm, norm2 = Norm(weight, bias, *running[:2]), Norm(weight2, bias2, *running[2:])
        options = NormOptions(self.views, kernels=kernels, eps=EPS, relu=self.relu)
        dy, dy2 = (g.to(DEVICE) for g in self.grads)
        if self.shortcut == "none":
            y = batch_norm_act(x, norm, options)
            y.backward(dy)
        elif not self.relu:
            y = batch_norm_act(x, norm, options, residual=skip)
            y.backward((dy.double() + dy2.double()).to(dy.dtype))
        else:
            y, again = block_end(x, norm, skip, norm2 if self.shortcut == "norm" else None, options)
            torch.autograd.backward([y, again], [dy, dy2])
        found = self.named(y, leaves)
        names = ("running_mean", "running_var", "running_mean2", "running_var2")
        return found | {n: t for n, t in zip(names, running, strict=True) if self.is_used(n)}

    def is_used(self, name: str) -> bool:
        return not name.endswith("2") or self.shortcut == "norm"

    def named(self, y: Tensor, leaves) -> dict[str, Tensor]:
        names = ("x", "skip", "weight", "bias", "weight2", "bias2")
        grads = {f"d{n}": t.grad for n, t in zip(names, leaves, strict=False) if t is not None}
        return {"y": y.detach()} | {n: g for n, g in grads.items() if self.is_used(n)}

    def exact_running(self) -> dict[str, Tensor]:
        found = {}
        for end, tensor in (("", self.x), ("2", self.skip)):
            if tensor is None or not self.is_used(end):
                continue
            mean, var = torch.zeros(tensor.shape[1]).double(), torch.ones(tensor.shape[1]).double()
            for view in tensor.double().chunk(self.views):  # once per view, in order
                dims = [dim for dim in range(view.dim()) if dim != 1]
                mean = 0.9 * mean + 0.1 * view.mean(dims)
                var = 0.9 * var + 0.1 * view.var(dims)
            found |= {f"running_mean{end}": mean, f"running_var{end}": var}
        return found


def assert_as_exact_as_plain(case: Case) -> None:
    """Error against fp64 at most twice that of plain PyTorch in the same dtype (style.md)."""
    exact = case.exact() | case.exact_running()
    plain, found = case.ours("plain"), case.ours("triton")
    assert found.keys() == plain.keys() <= exact.keys()
    for name, value in found.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        reference = exact[name].to(DEVICE)
        error = (value.double() - reference).abs().max().item()
        allowed = (plain[name].double() - reference).abs().max().item()
        # parameters' gradients are sums: a unit in the last place of the sum of absolute values
        scale = reference.abs().max().item()
        assert error <= 2 * allowed + 1e-6 * max(1.0, scale), (name, error, allowed)


# 3 rows a view of 5 channels: less than one byte of mask; 70: more than one block of channels, odd
SHAPES = [(6, 5, 3, 3), (4, 70, 5, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shortcut", ["none", "residual", "norm"])
def test_outputs_gradients_and_running_statistics_are_as_exact_as_plain_torch(
    shape, dtype, shortcut
):
    assert_as_exact_as_plain(Case(shape, dtype, shortcut=shortcut))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 5, 3, 3), {"shortcut": "none", "views": 1}),
        ((6, 5, 3, 3), {"shortcut": "norm", "views": 1}),
        ((8, 5, 3, 3), {"shortcut": "norm", "views": 4}),  # two pairs of views
        ((8, 12), {"shortcut": "none", "views": 4}),
        ((8, 12), {"shortcut": "none"}),  # the heads: (N, C)
        ((8, 12), {"shortcut": "none", "affine": False, "relu": False}),  # the projector's end
        ((4, 10, 3, 2), {"shortcut": "residual", "relu": False}),
        ((4, 10, 3, 2), {"shortcut": "residual", "affine": False}),
        ((4, 10, 3, 2), {"shortcut": "norm", "affine": False}),
        ((6, 16, 1, 1), {"shortcut": "residual"}),  # maps of one pixel
        ((4, 2048, 1, 1), {"shortcut": "none"}),  # ResNet-50's widest
        ((4, 8, 40, 40), {"shortcut": "none"}),  # several programs a view: their parts are merged
        ((2, 64, 65, 65), {"shortcut": "none"}),  # more than 64: a larger tile of parts
        ((6, 5, 3, 3), {"shortcut": "none", "offset": 1000.0}),
        ((4, 8, 40, 40), {"shortcut": "residual", "offset": 1000.0}),
    ],
)
def test_every_combination_is_as_exact_as_plain_torch(shape, options):
    assert_as_exact_as_plain(Case(shape, torch.float32, **options))


def test_more_tiles_than_an_axis_of_a_grid_takes_change_no_bit(monkeypatch):
    x = torch.randn(4, 8, 40, 40, generator=torch.Generator().manual_seed(0))  # 7 tiles a view
    x = channels_last(x).to(DEVICE)
    found = []
    for axis in (65535, 3):  # 3 x 3: two programs beyond the last row
        monkeypatch.setattr(launch, "MAX_TILES", axis)
        for call in (batch_norm_act, batch_norm_act_pool):
            leaf = x.clone().requires_grad_()
            y = call(leaf, Norm(), TWO_VIEWS)
            y.square().sum().backward()
            found.append([y, leaf.grad])
    assert launch.tiles(3200, 8, 2)[:2] == (3, (1, 3, 6))
    for one, folded in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, folded, strict=True))


def test_mean_1000_and_std_1_keep_the_digits_of_the_variance():
    x = torch.randn(8, 4, 30, 30, generator=torch.Generator().manual_seed(0)) + 1000
    x = channels_last(x).to(DEVICE)
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    batch_norm_act(x, Norm(None, None, mean, var), TRITON._replace(momentum=1.0))
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(var.double(), exact, rtol=1e-6, atol=0)  # sums of squares: 1e-1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8, 7, 10), (2, 70, 6, 5), (4, 3, 1, 2)])
def test_the_stem_with_max_pool_equals_plain_torch(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(shape, generator=generator).to(dtype)).to(DEVICE)
    size = (shape[0], shape[1], (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    dy = channels_last(torch.randn(size, generator=generator).to(dtype)).to(DEVICE)
    found = {}
    for kernels in ("plain", "triton"):
        leaf = x.detach().requires_grad_()
        weight, bias = (torch.full((shape[1],), v, device=DEVICE, requires_grad=True)
                        for v in (1.5, 0.2))  # fmt: skip
        norm = Norm(weight, bias, torch.zeros(shape[1], device=DEVICE),
                    torch.ones(shape[1], device=DEVICE))  # fmt: skip
        y = batch_norm_act_pool(leaf, norm, NormOptions(2, kernels=kernels))
        y.backward(dy)
        found[kernels] = [y, leaf.grad, weight.grad, bias.grad]
    if dtype == torch.float32:
        for value, reference in zip(found["triton"], found["plain"], strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    else:  # a tie of rounded values may fall otherwise: the maxima agree to their last place
        torch.testing.assert_close(found["triton"][0], found["plain"][0], rtol=2**-7, atol=2**-7)
        difference = (found["triton"][1] - found["plain"][1]).float().norm()
        assert difference < 0.1 * found["plain"][1].float().norm()


def test_of_equal_values_in_a_window_the_first_gets_the_gradient():
    x = torch.ones(2, 8, 4, 4)
    x[:, :, 0, 3] = -3.0  # a variance above 0; most windows hold nothing but equal values
    x = channels_last(x).to(DEVICE)
    grads = []
    for kernels in ("plain", "triton"):
        leaf = x.detach().requires_grad_()
        norm = Norm(*(torch.ones(8, device=DEVICE) for _ in range(2)))
        batch_norm_act_pool(leaf, norm, NormOptions(kernels=kernels)).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_normalising_again_in_backward_changes_no_gradient(groups):
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(4, 12, 5, 5, generator=generator)).to(DEVICE)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(12, 6, 3, 2, 1, groups=groups, bias=False).to(DEVICE)
        conv = conv.to(memory_format=torch.channels_last)
        leaf = x.detach().requires_grad_()
        weight, bias = (torch.full((12,), v, device=DEVICE, requires_grad=True) for v in (1.5, 0.2))
        norm = Norm(weight, bias, torch.zeros(12, device=DEVICE), torch.ones(12, device=DEVICE))
        if recompute:
            how = ConvOptions((2, 2), (1, 1), groups, recompute=True)
            y, *_ = batch_norm_act_conv(leaf, norm, conv.weight, NormOptions(2), conv=how)
        else:
            y = conv(batch_norm_act(leaf, norm, TWO_VIEWS))
        y.square().sum().backward()
        found.append([y, leaf.grad, weight.grad, bias.grad, conv.weight.grad, norm.running_var])
    for value, reference in zip(*found, strict=True):
        assert torch.equal(value, reference)


def test_a_nan_goes_on_to_output_and_gradient():
    x = torch.randn(4, 8, 3, 3)
    x[0, 2, 1, 1] = torch.nan
    x = channels_last(x).to(DEVICE).requires_grad_()
    y = batch_norm_act(x, Norm(), TWO_VIEWS)
    y.sum().backward()
    assert y[:2, 2].isnan().all() and x.grad[:2, 2].isnan().all()
    assert not y[2:].isnan().any() and not y[:, 3].isnan().any()
    pooled = batch_norm_act_pool(x.detach(), Norm(), TWO_VIEWS)
    assert pooled[:2, 2].isnan().all()


def test_no_two_gradients_share_memory():
    """fp16's unscaling divides gradients in place: shared ones would be divided twice."""
    x, skip = (channels_last(torch.randn(4, 6, 3, 3)).to(DEVICE).requires_grad_() for _ in range(2))
    weight, bias, weight2, bias2 = (torch.ones(6, device=DEVICE, requires_grad=True)
                                    for _ in range(4))  # fmt: skip
    norms = Norm(weight, bias), Norm(weight2, bias2)
    y, again = block_end(x, norms[0], skip, norms[1], TRITON)
    (y + again).sum().backward()
    leaves = (x, skip, weight, bias, weight2, bias2)
    assert len({leaf.grad.data_ptr() for leaf in leaves}) == len(leaves)
    dy = torch.ones_like(x)
    for _ in range(2):
        batch_norm_act(x, Norm(), TRITON._replace(relu=False), residual=skip).backward(dy)
    assert (dy == 1).all()  # the caller's own


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])  # whose square is no fp32 number
def test_what_is_not_finite_reaches_the_output_and_no_running_statistics(value, monkeypatch):
    x = torch.randn(4, 8, 3, 3)
    x[0, 2, 1, 1] = value
    x = channels_last(x).to(DEVICE)
    running = {}
    for kernels in ("plain", "triton"):
        running[kernels] = torch.full((2, 8), 0.5, device=DEVICE)
        norm = Norm(None, None, *running[kernels])
        y = batch_norm_act(x, norm, NormOptions(2, kernels=kernels))
        assert value == 1e30 or (y[:2, 2].isnan().all() and not y[:, 3].isnan().any())
    monkeypatch.setattr(batch_norm, "all_reduce", lambda sums, group: sums)  # a world of one
    running["over ranks"] = torch.full((2, 8), 0.5, device=DEVICE)
    norm = Norm(None, None, *running["over ranks"])
    options = NormOptions(2, group="group", kernels="plain", momentum=0.1, eps=EPS)
    batch_norm._batch_statistics([(x, norm)], (None,), options)
    for found in running.values():
        assert (found[:, 2] == 0.5).all() and (found[:, 3] != 0.5).all()
        torch.testing.assert_close(found, running["plain"])


def test_the_default_dtype_changes_nothing():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = batch_norm_act(x, Norm(), TRITON)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(before, batch_norm_act(x, Norm(), TRITON))
    finally:
        torch.set_default_dtype(torch.float32)


def nchw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(
    ("shape", "norm", "num_views", "message"),
    [
        ((4, 3, 5, 5), Norm(), 1, "channels_last"),
        ((4, 3, 5), Norm(), 1, r"\(N, C\)"),
        ((5, 3), Norm(), 2, "num_views=2"),
        ((2, 3), Norm(), 2, "one value"),
        ((4, 3), Norm(), 0, "num_views=0"),
        ((4, 3), Norm(torch.ones(2), torch.ones(2)), 1, r"\(3,\)"),
        ((4, 3), Norm(*torch.ones(3, 2).unbind(1)), 1, "contiguous"),
        ((4, 3), Norm(torch.ones(3)), 1, "both or neither"),
    ],
)
@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_wrong_layouts_and_shapes_are_refused(shape, norm, num_views, message, kernels):
    with pytest.raises(ValueError, match=message):
        batch_norm_act(nchw(*shape), norm, NormOptions(num_views, kernels=kernels))


@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_wrong_dtypes_and_shortcuts_are_refused(kernels):
    options = NormOptions(kernels=kernels)
    with pytest.raises(ValueError, match="floating"):
        batch_norm_act(nchw(4, 3).int(), Norm(), options)
    with pytest.raises(ValueError, match="must match"):
        batch_norm_act(nchw(4, 3), Norm(), options, residual=nchw(4, 3).half())
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        batch_norm_act_pool(nchw(4, 3), Norm(), options)


def test_float64_is_refused_by_kernels_that_compute_in_float32():
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="compute in float32: use float32"):
        batch_norm_act(x, Norm(), TRITON)
    assert batch_norm_act(x, Norm(), NormOptions(kernels="plain")).dtype == torch.float64
