"""Each method that SimSiam is compared with learns the digits' classes in forty small steps."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from pipeline.loader import Batch
from pipeline.order import SampleOrder
from train.config import Config, DataConfig, ModelConfig, OptimConfig
from train.distributed import World
from train.evaluation.embed import nearest, vote
from train.loop import train_step
from train.main import build_state
from train.methods import MethodConfig
from train.methods.byol import BYOLConfig
from train.methods.moco import MoCoConfig
from train.methods.simclr import SimCLRConfig
from train.methods.swav import SwAVConfig
from train.run.optim import Schedule

CPU = torch.device("cpu")
SIDE, BATCH, STEPS = 8, 64, 40
DIGITS = load_digits()
IMAGES, LABELS = torch.from_numpy(DIGITS.images).float() / 16, torch.from_numpy(DIGITS.target)
# as in the study "methods", but for BYOL's momentum: its steps are fewer still
METHODS = {
    "byol": (MethodConfig(name="byol", byol=BYOLConfig(momentum=0.9)), 128),
    "simclr": (MethodConfig(name="simclr", simclr=SimCLRConfig(temperature=0.5)), 128),
    "swav": (MethodConfig(name="swav", swav=SwAVConfig(prototypes=50, epsilon=0.025)), 32),
    "moco": (MethodConfig(name="moco", moco=MoCoConfig(queue=1024, temperature=0.07)), 128),
    "vicreg": (MethodConfig(name="vicreg"), 128),
}


def some_view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A crop of each image, lighter or darker. (N, 8, 8) -> (N, 8, 8, 3) uint8."""
    n = len(images)
    size = 0.45 + 0.55 * torch.rand(n, 1, 1, generator=generator)
    centre = (1 - size) * (2 * torch.rand(n, 2, 1, generator=generator) - 1)
    grid = F.affine_grid(torch.cat([size * torch.eye(2), centre], 2), [n, 1, SIDE, SIDE], False)
    cut = F.grid_sample(images[:, None], grid, align_corners=False)
    light = 0.4 + 1.2 * torch.rand(n, 1, 1, 1, generator=generator)
    return (cut * light).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


@torch.no_grad()
def knn_top1(backbone: torch.nn.Module) -> float:
    """Percent of every fifth image, by its neighbours among the others."""
    backbone.eval()
    x = (2 * IMAGES[:, None] - 1).expand(-1, 3, -1, -1)
    features = F.normalize(backbone(x.contiguous(memory_format=torch.channels_last)), dim=1)
    backbone.train()
    held_out = torch.arange(len(x)) % 5 == 0
    similarity, rows = nearest(features[held_out], features[~held_out], 200)
    guesses = vote(similarity, LABELS[~held_out][rows], num_classes=10, temperature=0.1)
    return 100 * (guesses == LABELS[held_out]).float().mean().item()


@pytest.mark.parametrize("name", METHODS)
def test_neighbours_share_a_class_more_often_after_training(name):
    method, dim = METHODS[name]
    config = Config(
        data=DataConfig(root=".", batch_size=BATCH, mean=(0.5,) * 3, std=(0.5,) * 3),
        model=ModelConfig(
            arch="resnet18", stem="cifar", width=8, projector_layers=2, projector_hidden=512,
            projector_dim=dim,
        ),
        method=method, precision="fp32", augment=AugmentConfig(size=SIDE), epochs=2,
        optim=OptimConfig(lr=1.0, weight_decay=5e-4, warmup_epochs=0.5 * (name == "moco")),
    )  # fmt: skip
    images = BATCH * STEPS // config.epochs
    world, order = World(0, 1, 0, 1, CPU, None), SampleOrder(images, batch_size=BATCH, seed=0)
    current, schedule = build_state(config, world, images), Schedule(order, config.epochs)
    untrained, generator = knn_top1(current.model.backbone), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        drawn = IMAGES[torch.randint(len(IMAGES), (BATCH,), generator=generator)]
        views = torch.stack([some_view(drawn, generator) for _ in range(2)])
        train_step(current, config, schedule, Batch(step, views, torch.arange(BATCH), None))
    assert knn_top1(current.model.backbone) > untrained + 15
