"""A torch.profiler trace of training steps with named ranges, for https://ui.perfetto.dev.

    python profiling/trace.py --data.root DIR --out trace.json.gz

Ranges: data, normalize, forward, backward, optimizer; on a GPU also what they launched there.
A newcomer's mistake: reading times off the trace. The profiler itself costs time; the harness
(profiling/throughput.py) times without it.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import gzip
import json
from pathlib import Path

from torch.profiler import record_function

from measure.harness import open_images, read_flags
from measure.loader_times import endless_order, open_loader
from measure.step_times import open_step
from measure.step_trace import timeline, trace_of
from train import distributed
from train.run.program import refuse


def main() -> None:
    """Read the flags, train some steps under the profiler, write the trace."""
    config, _ = read_flags("profiling/trace.py", "Write a profiler trace of training steps.")
    out = Path(config.out or "trace.json.gz")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        refuse(f"--out {out} cannot be written: name a file, such as trace.json.gz")
    try:
        with distributed.start(config.device, config) as world:
            reader = open_images(config, world)
            _, train = open_step(config, world)
            order, _ = endless_order(reader, config, world)
            batches = iter(open_loader(reader, order, config, world, range(8)))

            def step() -> None:
                with record_function("data"):
                    batch = next(batches)
                train(batch)

            trace = trace_of(step, world.device)
            if world.is_main:
                with gzip.open(out, "wt") as file:
                    json.dump(trace, file)
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    if world.is_main:
        print(json.dumps({"file": str(out), "ranges": timeline(trace)}))


if __name__ == "__main__":
    main()
