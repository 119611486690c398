"""SHA-256 of the weights after 20 steps of each method: `python tests/fingerprint.py`.

What a refactoring must leave as it is, bit for bit on one machine: run it before and after. With
`--demo` the whole demo is added (two minutes). One JSON line. Two machines differ: other
instructions sum in another order.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = ["--max_steps=20", "--eval.every_epochs=50"]
VARIANTS = {
    "simsiam": [],
    "4 targets": ["--method.target_steps=4"],
    "moving average": ["--method.moving_average=0.8", "--method.predictor=none"],
    "byol": ["--method.name=byol"],
    "simclr": ["--method.name=simclr"],
    "swav": ["--method.name=swav", "--method.swav.queue=128", "--method.swav.queue_from_epoch=0"],
    "moco": ["--method.name=moco", "--method.moco.queue=256"],
    "vicreg": ["--method.name=vicreg", "--optim.lr=0.05"],
    "lars": ["--optim.name=lars"],
}


def weights_of(*flags: str) -> str:
    """Of the last checkpoint of a demo with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train/main.py", "--config=configs/demo.yaml", "--device=cpu"]
        command += [f"--out={folder}/run", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(flags)}: {done.stderr[-1000:]}")
        path = max((Path(folder) / "run" / "checkpoints").glob("step-*")) / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    hashes = {name: weights_of(*flags, *STEPS) for name, flags in VARIANTS.items()}
    if "--demo" in sys.argv:
        hashes["demo"] = weights_of()
    print(json.dumps(hashes))
