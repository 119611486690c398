"""The training steps that ours is measured beside: what others would run on the same views.

official: facebookresearch/simsiam's model (@a7bc177): torchvision's ResNet with nn.BatchNorm2d (or
nn.SyncBatchNorm over ranks), two passes, NCHW, eager, in PyTorch's default precision: fp32 with
TF32 in convolutions where the GPU has it.
eager_bf16: the same in bf16 autocast and channels_last. compiled_plain: that under torch.compile.
lightly, solo_learn: the blocks of those packages put together as their examples do, eager, in
that precision.
A newcomer's mistake: giving them uint8. They get the two normalised views, on the device, for free.
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

WHAT_TO_INSTALL = {
    "torchvision": "not installed: pip install --no-deps torchvision==0.28.0",
    "lightly": "not installed: pip install --no-deps lightly",
    "solo": "not installed: pip install --no-deps solo-learn",
}
TwoViews = Callable[[Tensor, Tensor], Tensor]


def missing(package: str) -> str | None:
    """None where a package is installed, else what to do."""
    return None if importlib.util.find_spec(package) is not None else WHAT_TO_INSTALL[package]


@functools.cache
def _declare_ops() -> Any:
    library = torch.library.Library("torchvision", "DEF")
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        library.define(name + signature)
    return library  # kept by the cache: the operators live as long as it does


def import_torchvision() -> Any:
    """torchvision. Its CUDA wheel imports beside a CPU build of torch only if two ops exist.

    Not declared before that was tried: a library that loads declares them, and twice is fatal.
    """
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        _declare_ops()
        import torchvision

    return torchvision


def trunk(config: Config) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier, with the configured stem; its features."""
    network = getattr(import_torchvision().models, config.model.arch)(zero_init_residual=True)
    if config.model.stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    features = network.fc.in_features
    network.fc = nn.Identity()
    return network, features


class Official(nn.Module):
    """Source: facebookresearch/simsiam simsiam/builder.py, main_simsiam.py."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        self.trunk, width = trunk(config)
        hidden = model.projector_hidden or width
        layers: list[nn.Module] = []
        for inputs in [width] + [hidden] * (model.projector_layers - 2):
            layers += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(True)]
        last = nn.Linear(hidden if layers else width, model.projector_dim, bias=False)
        norm = nn.BatchNorm1d(model.projector_dim, affine=False)
        self.projector = nn.Sequential(*layers, last, norm)
        inner = model.predictor_hidden
        self.predictor = nn.Sequential(
            nn.Linear(model.projector_dim, inner, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(True),
            nn.Linear(inner, model.projector_dim),
        )

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss. Shapes: (N, 3, S, S) twice."""
        z1, z2 = (self.projector(self.trunk(x)) for x in (view1, view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        cosine = nn.functional.cosine_similarity
        pairs = (cosine(p1, z2.detach(), dim=1).mean(), cosine(p2, z1.detach(), dim=1).mean())
        return -(pairs[0] + pairs[1]) * 0.5


class Lightly(nn.Module):
    """lightly's heads and loss. Source: its examples/pytorch/simsiam.py."""

    def __init__(self, config: Config):
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import heads

        model = config.model
        self.trunk, width = trunk(config)
        self.projector = heads.SimSiamProjectionHead(
            width, model.projector_hidden or width, model.projector_dim
        )
        self.predictor = heads.SimSiamPredictionHead(
            model.projector_dim, model.predictor_hidden, model.projector_dim
        )
        self.criterion = NegativeCosineSimilarity()

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss. Shapes: (N, 3, S, S) twice."""
        z1, z2 = (self.projector(self.trunk(x)) for x in (view1, view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return 0.5 * (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach()))


class SoloLearn(Official):
    """solo-learn's loss on the official heads, which it has too. Source: solo/losses/simsiam.py."""

    def __init__(self, config: Config):
        """Read the file of the loss alone: the package asks for all of Lightning. ImportError."""
        super().__init__(config)
        found = importlib.util.find_spec("solo")
        if found is None or not found.submodule_search_locations:
            raise ImportError(WHAT_TO_INSTALL["solo"], name="solo")
        file = Path(found.submodule_search_locations[0]) / "losses" / "simsiam.py"
        self.criterion = runpy.run_path(str(file))["simsiam_loss_func"]

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss. Shapes: (N, 3, S, S) twice."""
        z1, z2 = (self.projector(self.trunk(x)) for x in (view1, view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return (self.criterion(p1, z2) + self.criterion(p2, z1)) / 2


def peer_step(
    name: str, config: Config, world: World, views: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """A call that does one training step of a peer and returns its loss.

    Shapes: views (N, 3, S, S) twice, fp32, normalised, contiguous. Raises: ImportError.
    """
    kinds: dict[str, type[Official] | type[Lightly]]
    kinds = {"lightly": Lightly, "solo_learn": SoloLearn}
    torch.manual_seed(config.seed)
    model: nn.Module = kinds.get(name, Official)(config).to(world.device)
    is_cuda, is_bf16 = world.device.type == "cuda", name in ("eager_bf16", "compiled_plain")
    if is_bf16:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's stub
        first, second = (view.to(memory_format=torch.channels_last) for view in views)
        views = first, second
    if world.size > 1:
        if is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[world.local_rank] if is_cuda else None, **own_buffers()
        )
    call = torch.compile(model, dynamic=False) if name == "compiled_plain" else model
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
    )  # fmt: skip

    def step() -> Tensor:
        ours = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which these programs leave
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=is_bf16):
            loss = call(*views)
        optimizer.zero_grad()
        loss.backward()
        torch.backends.cudnn.allow_tf32 = ours
        optimizer.step()
        return loss.detach()

    return step
