"""The formula of predict/step_model.py against what was measured elsewhere: MLPerf, slow links.

A newcomer's mistake: taking what strong scaling loses for communication. A GPU with 50 images takes
longer an image than one with 400, alone too: a time of every step, which is fitted here.
"""

from predict.fabric import Fabric, Protocol
from predict.limit import count
from predict.step_model import Work, predict, work_of
from train.config import MethodConfig, ModelConfig

MLPERF = {  # GPUs: (images a GPU, images/s a GPU)
    8: (400, 7009.0),
    64: (50, 4940.0),
    512: (40, 4394.0),
    3584: (16, 2820.0),
}
"""ResNet-50 v1.5 on H100, NVIDIA's entries; images over epoch seconds of the logs. Source:
github.com/mlcommons/training_results_v3.0, for 64 GPUs _v3.1 and _v4.0 (4,908 to 4,971)."""
MLPERF_EFFICIENCY = 0.694
"""Of 64 GPUs against 8 of the same round: 4,908 / 7,054 in v3.1, 4,971 / 7,161 in v4.0."""
RESNET50_BYTES = 2 * 25_557_032  # gradients in fp16
TCP_SHARE = 1448 / 1514
"""Payload of a full Ethernet frame that carries TCP with time stamps, as tc counts bytes."""


def fit_mlperf(work: Work, fabric: Fabric, known: tuple[int, int]) -> tuple[float, float]:
    """(seconds of every step, seconds an image) with which two of MLPerf's entries come out."""
    (images_a, rate_a), (images_b, rate_b) = (MLPERF[ranks] for ranks in known)
    exposed_a = exposed_b = 0.0
    fixed_s = image_s = 0.0
    for _ in range(20):  # what is exposed depends on the computation that hides it
        compute_a, compute_b = images_a / rate_a - exposed_a, images_b / rate_b - exposed_b
        image_s = (compute_a - compute_b) / (images_a - images_b)
        fixed_s = compute_a - images_a * image_s
        exposed_a, exposed_b = (
            predict(work, fabric, n, compute_s=compute_s, overlap=True).seconds - compute_s
            for n, compute_s in zip(known, (compute_a, compute_b), strict=True)
        )
    return fixed_s, image_s


def against_mlperf(work: Work, fabric: Fabric) -> dict:
    """MLPerf's strong scaling: from its 8 and 512 GPUs to 64 and 3,584; and by messages alone."""
    fixed_s, image_s = fit_mlperf(work, fabric, (8, 512))
    images_8, rate_8 = MLPERF[8]
    rows = {}
    for ranks, (images, published) in MLPERF.items():
        rates = [
            images / predict(work, fabric, ranks, compute_s=compute_s, overlap=True).seconds
            for compute_s in (fixed_s + images * image_s, images / rate_8)
        ]
        rows[ranks] = {
            "images_per_gpu": images,
            "published": published,
            "predicted": round(rates[0], 1),
            "by_messages_alone": round(rates[1], 1),
        }
    efficiency = rows[64]["predicted"] / rows[8]["predicted"]
    return {
        "fixed_ms": round(1e3 * fixed_s, 3),
        "image_us": round(1e6 * image_s, 2),
        "fitted_to": [8, 512],
        "gpus": rows,
        "efficiency_64": {"published": MLPERF_EFFICIENCY, "predicted": round(efficiency, 4),
                          "by_messages_alone": round(rows[64]["by_messages_alone"] / rate_8, 4)},
    }  # fmt: skip


def against_hosts(found: dict, *, overlap: bool) -> dict:
    """The formula for profiling/throttled.py's ranks and links beside what it measured.

    Gradients' bytes are known; what else was sent are batch norm's sums, half in each pass.
    """
    calls = found["collectives_per_step"].values()
    sent = sum(one["bytes"] for one in calls) - found["gradient_bytes"]
    counts = count(
        ModelConfig(**found["model"]), MethodConfig(), images=found["images_per_rank"],
        size=found["size"],
    )  # fmt: skip
    syncs = len(counts.sites)
    work = work_of(
        counts, gpu=(1.0, float("inf")), gradient_bytes=found["gradient_bytes"],
        forward_sums=(syncs, sent / 2), backward_sums=(syncs, sent / 2),
    )  # fmt: skip
    rows = []
    for row in found["steps"]:
        mbit_per_s = row["mbit_per_s"]
        hop = Protocol(False, 0.0, 0.0, found["hop_us"].get(str(row["ranks"]), 0.0), 1.0)
        gb_per_s = float("inf") if mbit_per_s is None else mbit_per_s / 8e3 * TCP_SHARE
        fabric = Fabric(gpus_per_node=1, net_gb_per_s=gb_per_s, protocols=(hop,))
        step = predict(work, fabric, row["ranks"], compute_s=row["compute_s"], overlap=overlap)
        rows.append(
            row
            | {
                "predicted_s": round(step.seconds, 4),
                "predicted_by_measured": round(step.seconds / row["step_s"], 3),
            }
        )
    return {"gradient_bytes": found["gradient_bytes"], "sum_bytes": sent, "syncs": 2 * syncs,
            "steps": rows}  # fmt: skip
