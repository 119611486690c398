"""ModelConfig: the --model flags, of every method; and the backbone that they make."""

from dataclasses import dataclass
from typing import Literal

from kernels.choose import Kernels
from train.network.resnet import ResNet
from train.network.values import at_least

HeadNorm = Literal["none", "hidden", "default", "all"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder f (backbone and projection MLP) and the prediction MLP h, of every method."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """The backbone, with torchvision's parameter names."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 convolution of stride 1 and no max-pool, for images of about 32 pixels."""
    width: int = 64
    """Channels of the stem; another value than 64 makes a network that no other tool has."""
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

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("width", "projector_dim", "predictor_hidden"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.projector_layers", self.projector_layers, 1, most=100)
        at_least("model.projector_hidden", self.projector_hidden, 0)


def build_backbone(model: ModelConfig) -> ResNet:
    """The encoder without its heads, from the configuration."""
    return ResNet(
        model.arch,
        stem=model.stem,
        width=model.width,
        zero_init_residual=model.zero_init_residual,
    )
