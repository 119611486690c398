"""The projection MLP (the end of the encoder f) and the prediction MLP h.

Source: SimSiam section 3 and the official code; recipes: the projector's last batch norm has no
affine part, the predictor's output has neither batch norm nor ReLU.
A newcomer's mistake: giving the last linear layer of the projector a bias. The official one is
frozen and cancelled by the batch norm that follows; here it does not exist.
"""

from torch import Tensor, nn

from train.norm import BatchNorm


class LinearNorm(nn.Module):
    """Linear without bias, batch norm, optional ReLU."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = True, affine: bool = True):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = BatchNorm(outputs, affine=affine)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, inputs) -> (N, outputs)."""
        return self.norm(self.linear(x), relu=self.relu)


def build_projector(inputs: int, *, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """`layers` fully connected layers, each with batch norm; the last one without ReLU and affine.

    Shapes: (N, inputs) -> (N, outputs). layers is 3 for ImageNet, 2 for CIFAR (appendix D).
    """
    widths = [inputs] + [hidden] * (layers - 1)
    body = [LinearNorm(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*body, LinearNorm(widths[-1], outputs, relu=False, affine=False))


def build_predictor(dim: int, *, hidden: int) -> nn.Sequential:
    """The bottleneck h. Shapes: (N, dim) -> (N, dim); hidden is dim / 4 in the paper."""
    return nn.Sequential(LinearNorm(dim, hidden), nn.Linear(hidden, dim))
