"""train/main.py as the cluster tests start it: each rank notes what it trained on and wrote.

In $SPY: rank-N.jsonl gets a line for each step (ids of the samples) and, at the end, the digest of
the weights and what was written under --out. $SPY_PAUSE_S slows the steps, so that a fault can be
brought about between two of them.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

if not __package__:  # run as a script, like those of profiling/
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from train import loop, main

NOTES = Path(os.environ["SPY"], f"rank-{os.environ.get('RANK', '0')}.jsonl")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
written: list[str] = []


def note(**values) -> None:
    """Append a line."""
    with NOTES.open("a") as file:
        file.write(json.dumps(values) + "\n")


def see_writes(event: str, arguments: tuple) -> None:
    """Python calls this before it opens or changes a file."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in CHANGES) and OUT in (path := str(arguments[0])):
        written.append(path)


def spied_loader(*arguments, **options):
    """The training loader, its batches written down."""
    for batch in real_loader(*arguments, **options):
        note(step=batch.step, ids=batch.ids.tolist())
        time.sleep(float(os.environ.get("SPY_PAUSE_S", "0")))
        yield batch


def spied_finish(config, world, current, *rest, **options):
    """The end of the run, with the digest of all weights and statistics of this rank."""
    digest = hashlib.sha256()
    for value in current.model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    result = real_finish(config, world, current, *rest, **options)
    note(weights=digest.hexdigest(), written=written)
    return result


real_loader, loop.view_loader = loop.view_loader, spied_loader
real_finish, main.finish = main.finish, spied_finish
OUT = next(word.split("=", 1)[1] for word in sys.argv if word.startswith("--out="))
sys.addaudithook(see_writes)
main.main()
