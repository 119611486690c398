"""A torch.profiler trace of training steps with named ranges, for https://ui.perfetto.dev.

    python profiling/trace.py --data.root DIR --out trace.json.gz

Ranges: data, normalize, forward, backward, optimizer; on a GPU also what they launched on it.
The profiler itself costs time: read times off profiling/throughput.py, which runs without it.
"""

import root_first  # isort: skip # noqa: F401

import gzip
import json
import os
from pathlib import Path

from torch.profiler import record_function

from measure.harness import open_images, read_flags
from measure.loader_times import OurLoader
from measure.results import errors_in_one_line
from measure.step_times import open_step
from measure.step_trace import timeline, trace_of
from pipeline.streams import print_result, protect_output
from train import distributed
from train.run.program import refuse


def main() -> None:
    """Read the flags, train some steps under the profiler, write the trace."""
    config, m = read_flags("profiling/trace.py", "Write a profiler trace of training steps.")
    out = Path(config.out or "trace.json.gz")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        refuse(f"--out {out} cannot be written: name a file, such as trace.json.gz")
    with errors_in_one_line(), distributed.start(config.device, config, options=m) as world:
        loader = OurLoader(open_images(config, world), config, world)
        _, train = open_step(config, world)
        batches = loader.next_batches(8)

        def step() -> None:
            with record_function("data"):
                batch = next(batches)
            train(batch)

        trace = trace_of(step, world.device)
        if world.is_main:
            with gzip.open(out, "wt") as file:
                json.dump(trace, file)
    if world.is_main:
        print_result({"file": str(out), "ranges": timeline(trace)}, kept=out)


if __name__ == "__main__":
    protect_output()
    main()
