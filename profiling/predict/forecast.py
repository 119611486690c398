"""What a step needs and takes on GPUs that are not held: throughput.py --dry-run.

Memory: 12 bytes a parameter (fp32 weight, gradient, momentum), 2 for the 16-bit copy, what is kept
for the backward pass, and the largest map's gradients. Time: the roofline of
profiling/predict/limit.py, and the range of profiling/predict/step_time.py. Communication is not in
it. All of this is arithmetic, nothing measured.
"""

from measure.results import print_table
from pipeline.decode import reserve
from pipeline.loader import GPU_THREADS
from predict.limit import GPU_GIB, GPUS, count, describe
from predict.step_time import step_time
from train.config import Config
from train.network.model import DTYPES

IMAGENET_IMAGES = 1_281_167
BYTES_A_PARAMETER = 14
CHECKPOINT_BYTES_A_PARAMETER = 8  # fp32 weight and momentum


def forecast(config: Config, *, gpu: str, gpus: int) -> dict:
    """The table on stderr and its figures.

    Raises: ValueError if the GPUs do not divide the batch, or it does not fit them or ImageNet.

    Units: GiB a GPU, milliseconds a step, minutes an epoch of ImageNet-1k, MB a checkpoint.
    """
    batch_size = config.data.batch_size
    if batch_size % gpus:
        raise ValueError(f"--gpus {gpus} does not divide --data.batch_size {batch_size}")
    if batch_size > IMAGENET_IMAGES:
        raise ValueError(
            f"--data.batch_size {batch_size} on --gpus {gpus} is more than all "
            f"{IMAGENET_IMAGES} images of ImageNet-1k: lower it"
        )
    rows, itemsize = batch_size // gpus, DTYPES[config.precision].itemsize
    counts = count(config.model, config.method, images=rows, size=config.augment.size)
    limit = describe(counts, *GPUS[gpu], itemsize=itemsize)
    kept = counts.saved_bytes(itemsize)
    largest = max(product.elements[1] for product in counts.products) * itemsize
    fixed = BYTES_A_PARAMETER * counts.parameters
    memory = fixed + kept + 3 * largest
    step = step_time(counts, gpu, itemsize=itemsize)
    minutes = [IMAGENET_IMAGES // batch_size * ms / 6e4 for ms in step["step_ms"]]
    result = {
        "gpu": gpu,
        "gpus": gpus,
        "images_per_gpu": rows,
        "memory_gib": round(memory / 2**30, 2),
        "kept_for_backward_mb_per_image": round(kept / rows / 1e6, 2),
        "roofline": limit,
        **step,
        "epoch_minutes": [float(f"{m:.3g}") for m in minutes],
        "dali_reserve": reserve(config.dali, threads=config.dali.threads or GPU_THREADS),
        "checkpoint_mb": round(CHECKPOINT_BYTES_A_PARAMETER * counts.parameters / 1e6, 1),
        "parameters": counts.parameters,
        "measured": False,
    }
    table = {
        "memory a GPU, DALI's left out": f"{result['memory_gib']} GiB",
        "DALI's reserve": result["dali_reserve"],
        "step by the roofline": f"{limit['step_ms']} ms",
        "step": " to ".join(map(str, result["step_ms"])) + " ms",
        **{
            f"  {name}": " to ".join(map(str, part)) + " ms"
            for name, part in step["parts_ms"].items()
        },
        "images/s of a GPU": " to ".join(map(str, reversed(step["images_per_s"]))),
        "epoch of ImageNet-1k": " to ".join(map(str, result["epoch_minutes"])) + " minutes",
        "checkpoint": f"{result['checkpoint_mb']} MB",
    }
    title = f"predicted, nothing measured: {gpus} x {gpu}, {rows} images a GPU"
    print_table(title, ("what", "figure"), table.items(), width=80)
    if memory > GPU_GIB[gpu] * 2**30:
        most = int((GPU_GIB[gpu] * 2**30 - fixed) * rows / (memory - fixed))
        raise ValueError(
            f"--gpu {gpu} has {GPU_GIB[gpu]} GiB, {rows} images need {result['memory_gib']}: lower "
            f"--data.batch_size to {most * gpus} or less, or raise --gpus"
        )
    return result
