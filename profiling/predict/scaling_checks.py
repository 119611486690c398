"""The formula of predict/step_model.py against what was measured elsewhere: MLPerf, slow links.

What strong scaling loses is not all communication: a GPU with 50 images takes longer an image than
one with 400, alone too. That time of every step is fitted.
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
    """(seconds of every step, seconds an image) that give two of MLPerf's entries."""
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
    return {
        "fixed_ms": round(1e3 * fixed_s, 3),
        "image_us": round(1e6 * image_s, 2),
        "fitted_to": [8, 512],
        "gpus": rows,
        "efficiency_64": {
            "published": MLPERF_EFFICIENCY,
            "predicted": round(rows[64]["predicted"] / rows[8]["predicted"], 4),
            "by_messages_alone": round(rows[64]["by_messages_alone"] / rate_8, 4),
        },
    }


def against_hosts(measured: dict, *, overlap: bool) -> dict:
    """The formula for profiling/throttled.py's ranks and links beside what it measured.

    Gradients' bytes are known; the rest of what was sent are batch norm's sums, half in each pass.
    """
    gradient_bytes, model = measured["gradient_bytes"], ModelConfig(**measured["model"])
    calls = measured["collectives_per_step"].values()
    sent = sum(call["bytes"] for call in calls) - gradient_bytes
    shape = {"images": measured["images_per_rank"], "size": measured["size"]}
    counts = count(model, MethodConfig(), **shape)
    half = len(counts.sites), sent / 2
    sums = {"forward_sums": half, "backward_sums": half}
    work = work_of(counts, gpu=(1.0, float("inf")), gradient_bytes=gradient_bytes, **sums)
    rows = []
    for row in measured["steps"]:
        ranks, mbit_per_s = row["ranks"], row["mbit_per_s"]
        hop = Protocol(False, 0.0, 0.0, measured["hop_us"].get(str(ranks), 0.0), 1.0)
        gb_per_s = float("inf") if mbit_per_s is None else mbit_per_s / 8e3 * TCP_SHARE
        fabric = Fabric(gpus_per_node=1, net_gb_per_s=gb_per_s, protocols=(hop,))
        step_s = predict(work, fabric, ranks, compute_s=row["compute_s"], overlap=overlap).seconds
        ratio = round(step_s / row["step_s"], 3)
        rows.append(row | {"predicted_s": round(step_s, 4), "predicted_by_measured": ratio})
    facts = {"gradient_bytes": gradient_bytes, "sum_bytes": sent, "syncs": 2 * len(counts.sites)}
    return facts | {"steps": rows}
