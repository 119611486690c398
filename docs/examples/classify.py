"""A linear classifier on an exported encoder, in PyTorch and torchvision alone; no GPU needed.

    python docs/examples/classify.py runs/mine/export-torchvision/resnet18.safetensors \\
        runs/digits-jpeg --size 16

ENCODER is what `train/export.py --to torchvision` wrote, DIR holds train/ and val/ with class
folders. Prints one JSON line: top-1 on val/ with few labels of each class, mean over seeds, of the
encoder and of the same network with random weights. Copy it and change what you need.
"""

import argparse
import json
import platform

import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn
from torchvision import transforms as t


def load_encoder(path: str) -> tuple[nn.Module, nn.Module]:
    """The encoder without its classifier, and the same network with random weights."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    networks = []
    for _ in range(2):
        network = torchvision.models.get_model(about["arch"], weights=None)
        if about["stem"] == "cifar":  # images of about 32 pixels: no stride, no max-pool
            network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            network.maxpool = nn.Identity()
        network.fc = nn.Identity()
        networks.append(network.eval())
    networks[0].load_state_dict(weights)
    return networks[0], networks[1]


@torch.inference_mode()
def embed(network: nn.Module, folder: str, size: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of a folder with class folders."""
    # mean and std are those of the training: data.mean and data.std in the run's config.yaml
    look = t.Compose([t.Resize(size), t.CenterCrop(size), t.ToTensor(), t.Normalize([0.5], [0.5])])
    images = torchvision.datasets.ImageFolder(folder, look)
    batches = list(torch.utils.data.DataLoader(images, batch_size=100))
    return torch.cat([network(x) for x, _ in batches]), torch.cat([y for _, y in batches])


def top1(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], labels: int, seed: int
) -> float:
    """Top-1 on the test images, percent, of a linear layer fitted to `labels` images a class."""
    x, y = train
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([shuffled[y[shuffled] == c][:labels] for c in y.unique()])
    mean, std = x[rows].mean(0), x[rows].std(0) + 1e-6
    classifier = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * classifier.weight.square().sum()
        total = nn.functional.cross_entropy(classifier((x[rows] - mean) / std), y[rows]) + penalty
        total.backward()
        return total

    optimizer.step(loss)
    guesses = classifier((test[0] - mean) / std).argmax(1)
    return 100 * (guesses == test[1]).float().mean().item()


def main() -> None:
    """Read the flags, embed once, fit a classifier for each number of labels and seed."""
    parser = argparse.ArgumentParser(description="A linear classifier on an exported encoder.")
    parser.add_argument("encoder", help="a file of train/export.py --to torchvision")
    parser.add_argument("folder", help="holds train/ and val/ with class folders")
    parser.add_argument("--size", type=int, default=224, help="side of an image, pixels")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 20, 100], help="of each class")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the labelled images")
    flags = parser.parse_args()
    torch.manual_seed(0)
    result: dict = {}
    for name, network in zip(("trained", "random"), load_encoder(flags.encoder), strict=True):
        parts = [embed(network, f"{flags.folder}/{part}", flags.size) for part in ("train", "val")]
        for labels in flags.labels:
            scores = [top1(parts[0], parts[1], labels, seed) for seed in range(flags.seeds)]
            result[f"{name}, {labels} a class"] = round(sum(scores) / len(scores), 1)
    machine = {"cpu": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"n": flags.seeds, "top1": result, "environment": machine}))


if __name__ == "__main__":
    main()
