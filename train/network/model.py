"""ModelConfig, the --model flags of every method, and what is built from them; --precision.

The heads are the projection MLP (the end of the encoder f) and the prediction MLP h of SimSiam,
section 3 and the official code: the projector's last batch norm has no affine part, the predictor's
output has neither batch norm nor ReLU. Other methods' heads are projectors with batch norm
elsewhere. The projector's last linear layer has no bias: the official one is frozen, and the batch
norm that follows cancels it.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.choose import Kernels
from train.network.norm import BatchNorm
from train.network.resnet import LAYERS, ResNet

HeadNorm = Literal["none", "hidden", "default", "all"]
Precision = Literal["bf16", "fp16", "tf32", "fp32"]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
"""Of the forward pass. bf16 and fp16 are autocast: weights, statistics, losses and optimizer stay
fp32. tf32 is fp32 whose convolutions and matrix products read 10 bits of mantissa of 23."""
MAX_COUNT = 1 << 40  # of counts and sizes: larger is surely a typo, 2^63 overflows in torch


def at_least(name: str, value: float, low: int, most: int = MAX_COUNT) -> None:
    """Raise ValueError unless a flag's value is in low .. most."""
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless a flag's value is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0, got {value}")


def share(name: str, value: float) -> None:
    """Raise ValueError unless a flag's value is in 0 .. 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0 .. 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder f (backbone and projection MLP) and the prediction MLP h, of every method."""

    arch: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "wide_resnet50_2",
    ] = "resnet50"
    """The backbone, with torchvision's parameter names."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 convolution of stride 1 and no max-pool, for images of about 32 pixels."""
    width: int = 64
    """Channels of the stem, to which all others are in proportion; even for resnext50_32x4d, whose
    groups keep 4 channels and get fewer. Exports to other tools need 64."""
    zero_init_residual: bool = True
    """The last batch norm of each block starts at weight 0 (as the official code)."""
    projector_layers: int = 3
    """3 for ImageNet, 2 for CIFAR (appendix D); SimCLR and VICReg 3, the other methods 2."""
    projector_hidden: int = 0
    """Width of the projector's hidden layers; 0 takes the backbone's feature dimension."""
    projector_dim: int = 2048
    """Dimension d of z and p; 256 for BYOL, 128 for SimCLR, SwAV and MoCo, 8192 for VICReg."""
    predictor_hidden: int = 512
    """Width of the predictor's hidden layer; d / 4 in the paper, 4096 for BYOL."""
    head_norm: HeadNorm = "default"
    """Batch norm in SimSiam's heads (table 3): none, in hidden layers, also at the projector's
    output (default), also at the predictor's (all)."""
    kernels: Kernels = "auto"
    """Batch norm, loss and normalisation: auto runs the Triton kernels on a CUDA device and
    PyTorch's own operations elsewhere."""
    recompute: bool = False
    """Normalise again in the backward pass instead of keeping what convolutions read: activations
    take a sixth less memory and 26 MB more an image are moved (ResNet-50). Triton kernels only."""
    stem_channels: Literal[3, 4, 8] = 3
    """Channels of the pixels that the stem's convolution reads, zero beyond the third, as are its
    weights for them: the same network, which loads 8 or 16 bytes a pixel instead of 6. Not yet run
    on a GPU."""
    conv_stats: Literal["auto", "true", "false"] = "false"
    """1x1 convolutions of stride 1 by Triton kernels that also sum for the batch norms beside them,
    instead of by cuDNN: at all shapes, or where a measurement at the run's start on its GPU has it
    faster and right (auto). Not yet run on a GPU."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("width", "projector_dim", "predictor_hidden"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.projector_layers", self.projector_layers, 1, most=100)
        at_least("model.projector_hidden", self.projector_hidden, 0)
        layers = LAYERS[self.arch]
        channels, of_group = layers.inner(self.width)
        if channels % of_group:
            raise ValueError(
                f"model.width must be a multiple of {64 // layers.groups} for {self.arch}, whose "
                f"groups have {of_group} channels, got {self.width}"
            )


def build_backbone(model: ModelConfig) -> ResNet:
    """The encoder without its heads, from the configuration."""
    names = ("stem", "width", "zero_init_residual")
    return ResNet(model.arch, **{name: getattr(model, name) for name in names})


class LinearNorm(nn.Module):
    """Linear, batch norm and ReLU; the linear layer has a bias where there is no batch norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        relu: bool = True,
        affine: bool = True,
        norm: bool = True,
        bias: bool = True,
    ):
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
    inputs: int,
    *,
    hidden: int,
    outputs: int,
    layers: int,
    norm: HeadNorm = "default",
    affine: bool = False,
    bias: bool = True,
) -> nn.Sequential:
    """`layers` fully connected layers, each with batch norm; the last one without ReLU.

    Shapes: (N, inputs) -> (N, outputs). layers is 3 for ImageNet, 2 for CIFAR (appendix D).
    norm "hidden" leaves it out of the last layer, "none" out of all (table 3); affine is the last
    batch norm's, bias the last layer's where it has none.
    """
    widths = [inputs] + [hidden] * (layers - 1)
    body = [LinearNorm(a, b, norm=norm != "none") for a, b in itertools.pairwise(widths)]
    ends_in_norm = norm in ("default", "all")
    last = LinearNorm(widths[-1], outputs, relu=False, affine=affine, norm=ends_in_norm, bias=bias)
    return nn.Sequential(*body, last)


def build_predictor(dim: int, *, hidden: int, norm: HeadNorm = "default") -> nn.Sequential:
    """The bottleneck h. Shapes: (N, dim) -> (N, dim); hidden is dim / 4 in the paper.

    norm "all" adds batch norm to the output, "none" leaves it out of both layers (table 3).
    """
    last = LinearNorm(hidden, dim, relu=False) if norm == "all" else nn.Linear(hidden, dim)
    return nn.Sequential(LinearNorm(dim, hidden, norm=norm != "none"), last)


def set_tf32(precision: Precision, device: torch.device) -> None:
    """TF32 in convolutions and matrix products, also those of kNN and probes, or in neither.

    fp32 must switch it off: PyTorch's default has TF32 in convolutions, NVIDIA's image in matrix
    products too (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1). By the flags that all of torch 2.11 to 2.13
    reads: after fp32_precision was set, Inductor's torch.get_float32_matmul_precision() raises.
    Raises: ValueError for tf32 on the CPU.
    """
    is_allowed = precision == "tf32"
    if is_allowed and device.type != "cuda":
        raise ValueError("--precision tf32 needs a CUDA device: use --precision fp32 on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed


@contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """The forward pass in this precision; nothing for tf32 and fp32."""
    dtype = DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield
