"""The DALI graphs: encoded images -> uint8 NHWC views, or one centre crop for evaluation.

One function, two placements: "gpu" decodes "mixed" and does all else on the GPU; "cpu" decodes and
crops here, colour and blur follow in pipeline/color_blur.py. An image is decoded once and cropped
for each view; flip is the crop's window turned over; colour is one linear map. Nothing here is
random (see pipeline/augment.py).
A newcomer's mistake: fp32 or NCHW output. uint8 NHWC is a quarter of the bytes, and normalise +
cast is the first op of the training step.
"""

# DALI makes its types and operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Sequence
from dataclasses import replace

import nvidia.dali
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.augment import AugmentConfig, draws_in_graph
from pipeline.decode import DecodeOptions

RESERVED = 2 << 30
"""Bytes of device memory, and of pinned memory, that a decoder reserves unless told otherwise."""
NDIM = {"roi_start": 1, "roi_end": 1, "color": 2, "color_mean": 2, "sigma": 0, "solarize": 0}


def dali_version() -> tuple[str, int]:
    """DALI's version, and the CUDA major it was built for: 13 for the wheel nvidia-dali-cuda130."""
    return nvidia.dali.__version__, int(str(nvidia.dali.__cuda_version__)[:2])


def decode_arguments(options: DecodeOptions, *, placement: str, threads: int) -> dict:
    """The decoder's keyword arguments. EXIF orientation is not applied, as in torchvision."""
    common = {"output_type": types.RGB, "adjust_orientation": False}
    if placement == "cpu":
        return {"device": "cpu", **common}
    # each thread holds its buffers for good, and so does the one that calls (nvImageCodec)
    share = RESERVED // (threads + 1)
    return {
        "device": "mixed",
        **common,
        "hw_decoder_load": options.hw_decoder_load,
        "device_memory_padding": options.device_memory_padding or min(256 << 20, share),
        "host_memory_padding": options.host_memory_padding or min(128 << 20, share // 2),
        "preallocate_width_hint": options.preallocate_width,
        "preallocate_height_hint": options.preallocate_height,
        "jpeg_fancy_upsampling": True,  # the same chroma upsampling as libjpeg on the CPU
    }


def build_view_pipeline(
    options: DecodeOptions,
    views: Sequence[AugmentConfig],
    *,
    batch_size: int,
    prefetch: int,
    num_threads: int,
    device_id: int | None,
    colors: bool,
) -> Pipeline:
    """The training graph. Inputs: "encoded" and, for each view v, "<name of a draw>_<v>".

    Shapes: an output (N, size, size, 3) uint8 for each view. device_id None places all on the CPU.
    Without `colors` the views are cropped alone, and the colour draws are no inputs.
    """
    placement = "cpu" if device_id is None else "gpu"
    decode = decode_arguments(options, placement=placement, threads=num_threads)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, **decode)
        outputs = []
        for number, config in enumerate(views):
            draw = {
                name: fn.external_source(name=f"{name}_{number}", dtype=types.FLOAT, ndim=ndim)
                for name, ndim in NDIM.items()
                if name in draws_in_graph(config, colors=colors)
            }
            view = window(image, draw["roi_start"], draw["roi_end"], size=config.size)
            if colors:
                view = color_map(view, draw["color"], draw["color_mean"], placement=placement)
            if "sigma" in draw:
                sigma = draw["sigma"]
                if sigma > 0:  # DALI's conditional: only the samples with a sigma are blurred
                    view = fn.gaussian_blur(view, sigma=sigma)
            if "solarize" in draw:
                chosen = draw["solarize"]
                if chosen > 0:
                    # 255 - x is x ^ 255: the mask is 255 where x is at least 128, else 0
                    view = view ^ fn.cast(255 * (view >= 128), dtype=types.UINT8)
            outputs.append(view)
        return tuple(outputs)

    pipeline = graph()
    pipeline.build()
    return pipeline


def window(image, start, end, *, size: int):
    """The window start .. end of an image, resized to (size, size) with antialiasing.

    Relative coordinates: a window outside the image would crash DALI 2.4 (SIGSEGV), and a header
    that disagrees with the decoder about the size must not.
    """
    return fn.resize(
        image,
        size=(size, size),
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def color_map(view, color, color_mean, *, placement: str):
    """out = A rgb + B mu with mu the view's mean colour, rounded and clamped to uint8."""
    mean = fn.reductions.mean(view, axes=(0, 1), keep_dims=True)
    shift = fn.coord_transform(mean, M=color_mean)
    if placement == "cpu":
        shift = fn.reshape(shift, shape=[3])
        return fn.coord_transform(view, M=color, T=shift, dtype=types.UINT8)
    # argument inputs must lie in host memory: on the GPU the shift is added instead
    return fn.cast(fn.coord_transform(view, M=color) + shift, dtype=types.UINT8)


def build_eval_pipeline(
    options: DecodeOptions,
    *,
    size: int,
    batch_size: int,
    prefetch: int,
    num_threads: int,
    device_id: int | None,
) -> Pipeline:
    """The evaluation graph: a window of each image, antialiased. Inputs: encoded and its window.

    Shapes: output (N, size, size, 3) uint8.
    """
    placement = "cpu" if device_id is None else "gpu"
    decode = decode_arguments(options, placement=placement, threads=num_threads)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    def graph():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, **decode)
        start, end = (
            fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
            for name in ("roi_start", "roi_end")
        )
        return window(image, start, end, size=size)

    pipeline = graph()
    pipeline.build()
    return pipeline


def undecodable(
    images: Sequence, options: DecodeOptions, *, device_id: int | None
) -> dict[int, str]:
    """The first line of DALI's complaint, by position, for each image that it cannot decode.

    Raises: RuntimeError where the device failed or memory lacked: that says nothing of an image.
    """
    placement = "cpu" if device_id is None else "gpu"
    # for one image at a time there is nothing to reserve, and a GPU in training is full
    options = replace(
        options, device_memory_padding=1 << 20, host_memory_padding=1 << 20,
        preallocate_width=0, preallocate_height=0,
    )  # fmt: skip
    decode = decode_arguments(options, placement=placement, threads=1)

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    def graph():
        data = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(data, **decode)

    found, pipeline = {}, None
    for position, encoded in enumerate(images):
        if pipeline is None:
            pipeline = graph()
            pipeline.build()
        pipeline.feed_input("encoded", [encoded])
        try:
            pipeline.run()
        except (RuntimeError, UnicodeDecodeError) as error:
            # DALI names the CUDA API that failed, and of the host's memory this alone
            if "CUDA " in str(error) or "bad_alloc" in str(error):
                raise
            lines = [line.strip() for line in str(error).splitlines()]
            complaint = (line for line in lines if "ailed" in line or "ailure" in line)
            found[position] = next(complaint, lines[0])
            pipeline = None  # not trusted after an error
    return found
