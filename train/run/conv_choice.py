"""--model.conv_stats auto: which 1x1 convolutions run the fused kernels, by a measurement at start.

Rank 0 measures each shape once on its GPU (kernels/conv_times.py) and keeps the times in the run
folder, so that a resumed run computes as it did; all ranks run what rank 0 chose. Where nothing was
measured cuDNN runs. Not yet run on a GPU.
"""

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kernels.choose import use_triton
from kernels.conv_times import Site, Times, compare
from train.config import Config
from train.distributed import World, from_main
from train.methods import Method
from train.network.model import DTYPES
from train.network.norm import Conv
from train.network.resnet import BasicBlock, Bottleneck, ResNet

FILE = "conv_times.json"  # in the run folder


def conv_sites(
    net: ResNet, views: int, images: int, size: int, dtype: torch.dtype
) -> Iterator[tuple[Conv, str, Site]]:
    """Each pass of a convolution that can be fused, with its name in ConvOptions.

    images: over all views, of size x size pixels.
    """
    size = -(-size // net.conv1.stride[0])
    size = -(-size // 2) if net.has_pool else size
    before = None  # the kind of the end of the block before
    for block in (b for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for b in layer):
        block = cast(BasicBlock | Bottleneck, block)
        reads: list[tuple[nn.Module, int, Any]] = [(block.conv1, size, before)]
        if block.downsample is not None:
            reads.append((block.downsample[0], size, None))
        size = -(-size // max(block.conv1.stride[0], block.conv2.stride[0]))
        if isinstance(block, Bottleneck):
            reads.append((block.conv3, size, "relu"))
        for conv, pixels, kind in reads:
            assert isinstance(conv, Conv)
            if conv.can_sum:
                shape = images, conv.in_channels, pixels, pixels
                yield conv, "statistics", Site("statistics", views, shape, conv.out_channels, dtype)
                if kind is not None:
                    yield conv, "reduce", Site(kind, views, shape, conv.out_channels, dtype)
        before = "residual" if block.downsample is None else "norm"


def choose(
    model: Method,
    config: Config,
    world: World,
    cache: Path,
    log: Callable[[str], None],
) -> None:
    """Set each convolution's options to what is faster on this GPU, for auto on a CUDA device.

    cache: the file of the times, which rank 0 reads and writes. Called by all ranks.
    """
    if config.model.conv_stats != "auto" or not use_triton(
        config.model.kernels, torch.empty(0, device=world.device)
    ):
        return
    images = config.data.batch_size // world.size * config.method.spec.num_views
    nets = [module for module in model.modules() if isinstance(module, ResNet)]
    sites = [
        each
        for net in nets
        for each in conv_sites(
            net, net.bn1.num_views, images, config.augment.size, DTYPES[config.precision]
        )
    ]
    times = {}
    if world.is_main:
        times = measured({site for *_, site in sites}, world.device, cache)
    times = from_main(world, times)
    for conv, name, site in sites:
        conv.options = conv.options._replace(**{name: times[site].gain_ms > 0})
    gains = [times[site].gain_ms for *_, site in sites]
    wrong = sum(not time.agrees for time in times.values())
    log(
        f"conv_stats: {sum(gain > 0 for gain in gains)} of {len(gains)} passes of 1x1 convolutions "
        f"run the fused kernels, {sum(gains):.2f} ms a step faster than cuDNN in {cache.name}"
        + (f"; {wrong} shapes failed the check and are left to cuDNN" if wrong else "")
    )


def measured(sites: set[Site], device: torch.device, cache: Path) -> dict[Site, Times]:
    """Times of the sites on this GPU with these versions: of the file, which gets the others."""
    kept = json.loads(cache.read_text()) if cache.exists() else {}
    known = kept.setdefault(machine(device), {})
    for site in sorted(sites, key=label):
        if label(site) not in known:
            known[label(site)] = compare(site, device)._asdict()
    unfinished = cache.with_suffix(".tmp")
    unfinished.write_text(json.dumps(kept, indent=1) + "\n")
    unfinished.replace(cache)
    return {site: Times(**known[label(site)]) for site in sites}


def machine(device: torch.device) -> str:
    """What the times depend on beside the site."""
    triton, cudnn = importlib.metadata.version("triton"), torch.backends.cudnn.version()
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, Triton {triton}, cuDNN {cudnn}"


def label(site: Site) -> str:
    """The site as text: "relu, 2 views, 512x64x56x56 to 256, bfloat16"."""
    shape, dtype = "x".join(map(str, site.shape)), str(site.dtype).removeprefix("torch.")
    return f"{site.kind}, {site.views} views, {shape} to {site.outputs}, {dtype}"
