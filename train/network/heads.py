"""The projection MLP (the end of the encoder f) and the prediction MLP h.

Source: SimSiam section 3 and the official code: the projector's last batch norm has no affine part,
the predictor's output has neither batch norm nor ReLU. The other methods' heads are projectors with
batch norm elsewhere.
A newcomer's mistake: giving the last linear layer of the projector a bias. The official one is
frozen and cancelled by the batch norm that follows; here it does not exist.
"""

from torch import Tensor, nn

from train.network.model import HeadNorm
from train.network.norm import BatchNorm


class LinearNorm(nn.Module):
    """Linear without bias, batch norm, optional ReLU; without `norm` the linear layer has one."""

    def __init__(
        self, inputs: int, outputs: int, *, relu: bool = True, affine: bool = True,
        norm: bool = True, bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias and not norm)
        self.norm = BatchNorm(outputs, affine=affine) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, inputs) -> (N, outputs)."""
        x = self.linear(x)
        if self.norm is not None:
            return self.norm(x, relu=self.relu)
        return x.relu() if self.relu else x


def build_projector(
    inputs: int, *, hidden: int, outputs: int, layers: int, norm: HeadNorm = "default",
    affine: bool = False, bias: bool = True,
) -> nn.Sequential:  # fmt: skip
    """`layers` fully connected layers, each with batch norm; the last one without ReLU.

    Shapes: (N, inputs) -> (N, outputs). layers is 3 for ImageNet, 2 for CIFAR (appendix D).
    norm "hidden" leaves it out of the last layer, "none" out of all (table 3); affine is the last
    batch norm's, bias the last layer's where it has none.
    """
    widths = [inputs] + [hidden] * (layers - 1)
    body = [LinearNorm(a, b, norm=norm != "none") for a, b in zip(widths, widths[1:], strict=False)]
    last = LinearNorm(
        widths[-1], outputs, relu=False, affine=affine, norm=norm in ("default", "all"), bias=bias
    )
    return nn.Sequential(*body, last)


def build_predictor(dim: int, *, hidden: int, norm: HeadNorm = "default") -> nn.Sequential:
    """The bottleneck h. Shapes: (N, dim) -> (N, dim); hidden is dim / 4 in the paper.

    norm "all" adds batch norm to the output, "none" leaves it out of both layers (table 3).
    """
    last = LinearNorm(hidden, dim, relu=False) if norm == "all" else nn.Linear(hidden, dim)
    return nn.Sequential(LinearNorm(dim, hidden, norm=norm != "none"), last)
