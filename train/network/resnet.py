"""ResNet-18 to 152, ResNeXt and wide ResNet: the backbone, with torchvision's parameter names.

Batch norm, ReLU and addition are one call (norm.py), so there is no relu module; the names of all
parameters and buffers still are torchvision's, and a test loads both ways.
Source: He et al., CVPR 2016; stride on the 3x3 convolution as torchvision ("v1.5"). Xie et al.,
CVPR 2017 (ResNeXt); Zagoruyko & Komodakis, BMVC 2016 (wide).
CIFAR stem: SimSiam appendix D (3x3 convolution, stride 1, no max-pool).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from train.network.norm import BatchNorm, Conv, Convolved


class Layers(NamedTuple):
    """What tells one network from another."""

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    """Blocks of each stage."""
    groups: int = 1
    """Of a bottleneck's 3x3 convolutions, where the stem has 64 channels."""
    group_width: int = 64
    """Channels of a group in the first stage; they double from stage to stage."""

    def inner(self, width: int) -> tuple[int, int]:
        """Channels of the first stage's 3x3 convolutions, and of one group, with a stem of `width`.

        With another width than 64 the groups of a grouped network keep their channels, and there
        are more or fewer of them: resnext50_32x4d with a stem of 16 has 8 groups of 4.
        """
        channels = width * self.groups * self.group_width // 64
        return channels, self.group_width if self.groups > 1 else channels


LAYERS = {
    "resnet18": Layers("basic", (2, 2, 2, 2)),
    "resnet34": Layers("basic", (3, 4, 6, 3)),
    "resnet50": Layers("bottleneck", (3, 4, 6, 3)),
    "resnet101": Layers("bottleneck", (3, 4, 23, 3)),
    "resnet152": Layers("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Layers("bottleneck", (3, 4, 6, 3), groups=32, group_width=4),
    "wide_resnet50_2": Layers("bottleneck", (3, 4, 6, 3), group_width=128),
}


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> Conv:
    """A convolution without bias that keeps the size at stride 1."""
    padding = kernel // 2
    return Conv(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


class SlicedConv(Conv):
    """A 1x1 convolution of stride 2 that slices, then convolves with stride 1.

    For narrow shortcuts: given a stride and fewer input channels than a vector register holds (8 on
    AVX2, 16 on AVX-512), oneDNN 3.x writes past its workspace in the fp32 backward pass of the
    weights: wrong gradients, a crash or a hang. Source: github.com/uxlfoundation/oneDNN/issues/6035
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: (N, inputs, H, W) -> (N, outputs, H/2, W/2)."""
        return super().forward(input[:, :, ::2, ::2])


class StemConv(Conv):
    """The first convolution, of pixels that may have further channels, all zero.

    Its weights for these are zero and no parameter.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: (N, 3 or more, H, W) -> (N, outputs, H/stride, W/stride)."""
        if (more := input.shape[1] - self.in_channels) == 0:
            return super().forward(input)
        weight = nn.functional.pad(self.weight, (0, 0, 0, 0, 0, more))
        return self._conv_forward(input, weight, None)


class BlockEnd(NamedTuple):
    """The end of a block, not computed yet: the next 1x1 convolution may be fused with it."""

    x: Convolved
    shortcut: Convolved
    norm: BatchNorm | None
    """None: of the stem, whose end is x."""
    shortcut_norm: BatchNorm | None = None

    def compute(self) -> tuple[Tensor, Tensor]:
        """One tensor for the main branch and the shortcut."""
        if self.norm is None:
            return self.x.x, self.shortcut.x
        return self.norm.end_block(self.x, self.shortcut, self.shortcut_norm)

    def then_conv(self, conv: Conv, norm: BatchNorm) -> tuple[Convolved, Tensor]:
        """The main branch's first convolution, which `norm` follows, and the shortcut."""
        if self.norm is None:
            return norm.convolve(self.x.x, conv), self.shortcut.x
        return self.norm.end_block_then_conv(self.x, self.shortcut, self.shortcut_norm, conv)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride=stride), BatchNorm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), BatchNorm(planes)
        self.downsample = shortcut(inputs, planes, stride)

    def forward(self, before: BlockEnd) -> BlockEnd:
        """Shapes: (N, inputs, H, W) -> (N, planes, H/stride, W/stride)."""
        main, skip = before.compute()
        out = self.bn1.then_conv(Convolved(self.conv1(main)), self.conv2)
        return block_end(self.bn2, out, skip, self.downsample)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and the shortcut; the 3x3 has the stride and the groups.

    Its channels are `widening` times the planes.
    """

    expansion = 4

    def __init__(
        self, inputs: int, planes: int, stride: int, *, widening: int = 1, groups: int = 1
    ):
        super().__init__()
        outputs, inner = planes * self.expansion, planes * widening
        self.conv1, self.bn1 = conv(inputs, inner, 1), BatchNorm(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=groups)
        self.bn2 = BatchNorm(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), BatchNorm(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, before: BlockEnd) -> BlockEnd:
        """Shapes: (N, inputs, H, W) -> (N, 4 planes, H/stride, W/stride)."""
        out, skip = before.then_conv(self.conv1, self.bn1)
        out = self.bn1.then_conv(out, self.conv2)
        out = self.bn2.then_conv(out, self.conv3)
        return block_end(self.bn3, out, skip, self.downsample)


def block_end(
    norm: BatchNorm, x: Convolved, skip: Tensor, downsample: nn.Sequential | None
) -> BlockEnd:
    """The last batch norm of a block, the shortcut (projected where it must be) and ReLU."""
    if downsample is None:
        return BlockEnd(x, Convolved(skip), norm)
    projection, projection_norm = cast(tuple[Conv, BatchNorm], tuple(downsample))
    return BlockEnd(x, projection_norm.convolve(skip, projection), norm, projection_norm)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The projection of a shortcut whose shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    projection = conv(inputs, outputs, 1, stride=stride)
    if stride == 2 and inputs < 16:
        projection = SlicedConv(inputs, outputs, 1, bias=False)
    return nn.Sequential(projection, BatchNorm(outputs))


def stage(
    block: Callable[[int, int, int], BasicBlock | Bottleneck],
    inputs: int,
    planes: int,
    depth: int,
    *,
    stride: int,
) -> nn.Sequential:
    """`depth` blocks, the first of which has the stride and changes the channels."""
    first = block(inputs, planes, stride)
    outputs = planes * first.expansion
    return nn.Sequential(first, *(block(outputs, planes, 1) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """The backbone without its classifier: features are the global average pool.

    `width` is the number of channels of the stem (64 in every published network); all others are
    in proportion to it (Layers.inner).
    """

    def __init__(self, arch: str, *, stem: str, width: int = 64, zero_init_residual: bool = True):
        super().__init__()
        layers = LAYERS[arch]
        block, expansion, depths = BasicBlock, BasicBlock.expansion, layers.depths
        if layers.block == "bottleneck":
            inner, of_group = layers.inner(width)
            block = partial(Bottleneck, widening=inner // width, groups=inner // of_group)
            expansion = Bottleneck.expansion
        self.has_pool = stem == "imagenet"
        size, stride = (7, 2) if self.has_pool else (3, 1)
        self.conv1 = StemConv(3, width, size, stride, size // 2, bias=False)
        self.bn1 = BatchNorm(width)
        widths = [width << index for index in range(4)]
        ends = [planes * expansion for planes in widths]
        self.layer1 = stage(block, width, widths[0], depths[0], stride=1)
        self.layer2 = stage(block, ends[0], widths[1], depths[1], stride=2)
        self.layer3 = stage(block, ends[1], widths[2], depths[2], stride=2)
        self.layer4 = stage(block, ends[2], widths[3], depths[3], stride=2)
        self.num_features = ends[3]
        self._init(zero_init_residual)

    def _init(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                assert last.weight is not None
                nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) channels_last -> (N, num_features).

        With 4 or 8 channels those beyond the third are zero (--model.stem_channels).
        """
        x = self.conv1(x)
        x = self.bn1.pool(x) if self.has_pool else self.bn1(x, relu=True)
        end = BlockEnd(Convolved(x), Convolved(x), None)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            end = layer(end)
        x, _ = end.compute()
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
