"""The training steps that ours is measured beside: what others would run on the same views.

official: facebookresearch/simsiam's model (@a7bc177): torchvision's ResNet with nn.BatchNorm2d (or
nn.SyncBatchNorm over ranks), two passes, NCHW, eager, in PyTorch's default precision: fp32 with
TF32 in convolutions where the GPU has it.
eager_bf16: the same in bf16 autocast and channels_last. compiled_plain: that under torch.compile.
lightly, solo_learn: the blocks of those packages combined as in their examples, eager, in that
precision.
They get the two normalised views, not uint8, on the device, for free.
"""

import functools
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Config
from train.distributed import World, own_buffers
from train.network.resnet import LAYERS

FOR_LIGHTLY = "not installed: pip install --no-deps lightly tqdm lightning-utilities"
WHAT_TO_INSTALL = {
    "torchvision": "not installed: pip install --no-deps torchvision==0.28.0",
    **dict.fromkeys(("lightly", "tqdm", "lightning_utilities"), FOR_LIGHTLY),
    "solo": "not installed: pip install --no-deps solo-learn",
}


def missing(package: str) -> str | None:
    """None where a package is installed, else what to do."""
    return None if importlib.util.find_spec(package) is not None else WHAT_TO_INSTALL[package]


@functools.cache
def _declare_ops() -> Any:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # kept by the cache: the operators live as long as it does


def import_torchvision() -> Any:
    """torchvision. Its CUDA wheel imports beside a CPU build of torch only if two ops exist.

    They are declared only after an import failed: a library that loads declares them too, and a
    second declaration ends the process.
    """
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        _declare_ops()
        import torchvision

    return torchvision


def torchvision_resnet(arch: str, width: int) -> tuple[Any, int]:
    """torchvision's network, all channels in proportion to `width` (64: as published); features.

    Not for grouped and wide networks of another width than 64.
    """
    models = import_torchvision().models

    class Scaled(models.ResNet):
        def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> nn.Sequential:
            if planes == 64:  # the first stage
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *rest, **options)

    if width == 64:
        network = getattr(models, arch)(zero_init_residual=True)
        return network, network.fc.in_features
    block = {"basic": models.resnet.BasicBlock, "bottleneck": models.resnet.Bottleneck}
    layers = LAYERS[arch]
    network = Scaled(block[layers.block], list(layers.depths), zero_init_residual=True)
    network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    return network, network.fc.in_features * width // 64


class Official(nn.Module):
    """Source: facebookresearch/simsiam simsiam/builder.py, main_simsiam.py."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        network, features = torchvision_resnet(model.arch, model.width)
        if model.stem == "cifar":
            network.conv1 = nn.Conv2d(3, model.width, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        network.fc = nn.Identity()
        self.trunk = network
        self.projector, self.predictor = self.heads(config, features)

    def heads(self, config: Config, width: int) -> tuple[nn.Module, nn.Module]:
        """Projector and predictor on `width` features."""
        model = config.model
        hidden, inner = model.projector_hidden or width, model.predictor_hidden
        layers: list[nn.Module] = []
        for inputs in [width] + [hidden] * (model.projector_layers - 2):
            layers += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(True)]
        last = nn.Linear(hidden if layers else width, model.projector_dim, bias=False)
        norm = nn.BatchNorm1d(model.projector_dim, affine=False)
        predictor = nn.Sequential(
            nn.Linear(model.projector_dim, inner, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(True),
            nn.Linear(inner, model.projector_dim),
        )
        return nn.Sequential(*layers, last, norm), predictor

    def criterion(self, p: Tensor, z: Tensor) -> Tensor:
        """The negative cosine of prediction and target."""
        return -nn.functional.cosine_similarity(p, z.detach(), dim=1).mean()

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss. Shapes: (N, 3, S, S) twice."""
        z1, z2 = (self.projector(self.trunk(x)) for x in (view1, view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        # as autocast on a GPU has it; on a CPU it leaves the loss in bf16
        z1, z2, p1, p2 = (x.float() for x in (z1, z2, p1, p2))
        return (self.criterion(p1, z2) + self.criterion(p2, z1)) / 2


class Lightly(Official):
    """lightly's heads and loss. Source: its examples/pytorch/simsiam.py."""

    def __init__(self, config: Config):
        super().__init__(config)
        from lightly.loss import NegativeCosineSimilarity

        loss = NegativeCosineSimilarity()
        self.criterion = lambda p, z: loss(p, z.detach())

    def heads(self, config: Config, width: int) -> tuple[nn.Module, nn.Module]:
        """Projector and predictor on `width` features."""
        from lightly.models.modules import heads

        model = config.model
        hidden, dim = model.projector_hidden or width, model.projector_dim
        projector = heads.SimSiamProjectionHead(width, hidden, dim)
        return projector, heads.SimSiamPredictionHead(dim, model.predictor_hidden, dim)


class SoloLearn(Official):
    """solo-learn's loss on the official heads, which it has too. Source: solo/losses/simsiam.py."""

    def __init__(self, config: Config):
        """Read the file of the loss alone: the package needs all of Lightning. ImportError."""
        super().__init__(config)
        spec = importlib.util.find_spec("solo")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(WHAT_TO_INSTALL["solo"], name="solo")
        file = Path(spec.submodule_search_locations[0]) / "losses" / "simsiam.py"
        self.criterion = runpy.run_path(str(file))["simsiam_loss_func"]


def peer_step(
    name: str, config: Config, world: World, views: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """A call that does one training step of a peer and returns its loss.

    Shapes: views (N, 3, S, S) twice, fp32, normalised, contiguous. Raises: ImportError.
    """
    torch.manual_seed(config.seed)
    kind = {"lightly": Lightly, "solo_learn": SoloLearn}.get(name, Official)
    model: nn.Module = kind(config).to(world.device)
    is_cuda, is_bf16 = world.device.type == "cuda", name in ("eager_bf16", "compiled_plain")
    first, second = views
    if is_bf16:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's stub
        first, second = (view.to(memory_format=torch.channels_last) for view in views)
    if world.size > 1:
        if is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        devices = [world.local_rank] if is_cuda else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices, **own_buffers())
    call = torch.compile(model, dynamic=False) if name == "compiled_plain" else model
    momentum, decay = config.optim.momentum, config.optim.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum, weight_decay=decay)

    def step() -> Tensor:
        ours = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which these programs leave
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=is_bf16):
            loss = call(first, second)
        optimizer.zero_grad()
        loss.backward()
        torch.backends.cudnn.allow_tf32 = ours
        optimizer.step()
        return loss.detach()

    return step
