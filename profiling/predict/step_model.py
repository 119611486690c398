"""A step of many ranks: computation, batch norm's collectives, gradients that travel meanwhile.

docs/scaling.md has it as a formula. The forward pass waits for each batch norm's all-reduce. The
backward pass goes layer by layer; DistributedDataParallel sends a bucket of gradients as soon as it
is full, and what is left at the end is waited for. Ranks are alike: no stragglers. Times do not add
up: gradients travel during the backward pass; the sums of synchronised batch norm do not, and wait
for the gradients that were sent before them.
"""

from dataclasses import dataclass

from predict.fabric import Fabric
from predict.limit import Counts

FORWARD_SHARE = 1 / 3  # of a convolution's three passes
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes; torch's DistributedDataParallel


@dataclass(frozen=True)
class Work:
    """What one rank does and sends in a step. Layers are in the forward pass's order."""

    backward_shares: tuple[float, ...]
    """Of the backward pass's time, by layer; sum 1."""
    gradient_bytes: tuple[float, ...]
    forward_sums: tuple[int, float] = (0, 0.0)
    """Collectives of batch norm in the forward pass, and their bytes together."""
    backward_sums: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Step:
    """A predicted step. Units: seconds; what is exposed is time in which nothing is computed."""

    seconds: float
    sums_s: float
    """The collectives of batch norm alone."""
    gradients_s: float
    """Waiting for gradients, at their end or before a batch norm's collective."""


def work_of(counts: Counts, *, gpu: tuple[float, float], gradient_bytes: float, **sums) -> Work:
    """The layers of a model; `gpu` is FLOP/s and bytes/s, `gradient_bytes` their total."""
    rate, bandwidth = gpu
    seconds, sizes = [], []
    for product in counts.products:
        moved = 2 * sum(product.elements) / bandwidth
        seconds.append((product.passes - 1) * max(2 * product.macs / rate, moved))
        sizes.append(product.elements[2])
    return Work(
        tuple(s / sum(seconds) for s in seconds),
        tuple(gradient_bytes * size / sum(sizes) for size in sizes),
        **sums,
    )


def predict(work: Work, fabric: Fabric, ranks: int, *, compute_s: float, overlap: bool) -> Step:
    """A step of `ranks` ranks, each of which takes `compute_s` alone.

    A collective begins when the one before it has ended, as on one communicator; batch norm's sums
    have another communicator, so that this is the most they wait.
    """
    layers = len(work.gradient_bytes)
    num_forward, forward_bytes = work.forward_sums
    num_backward, backward_bytes = work.backward_sums
    forward_s = num_forward * fabric.all_reduce_s(ranks, forward_bytes / max(num_forward, 1))
    sum_s = fabric.all_reduce_s(ranks, backward_bytes / max(num_backward, 1))
    backward_s = (1 - FORWARD_SHARE) * compute_s
    clock = FORWARD_SHARE * compute_s + forward_s
    link_free, filled, limit, late_s = 0.0, 0.0, FIRST_BUCKET, 0.0
    for layer in reversed(range(layers)):
        clock += work.backward_shares[layer] * backward_s
        if num_backward:
            clock = max(clock, link_free) + num_backward / layers * sum_s
        filled += work.gradient_bytes[layer]
        if filled >= limit or layer == 0:
            bucket_s = fabric.all_reduce_s(ranks, filled)
            if overlap:
                link_free = max(clock, link_free) + bucket_s
            else:
                late_s += bucket_s
            filled, limit = 0.0, BUCKET
    seconds = max(clock, link_free) + late_s
    sums_s = forward_s + num_backward * sum_s
    return Step(seconds, sums_s, max(0.0, seconds - compute_s - sums_s))
