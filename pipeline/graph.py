"""The DALI graphs: encoded images -> uint8 NHWC views, or one centre crop for evaluation.

One function, two placements: "gpu" decodes "mixed" and does all else on the GPU; "cpu" decodes and
crops, colour and blur follow in pipeline/color_blur.py. An image is decoded once and cropped for
each view; flip swaps the window's edges; colour is one linear map; nothing is random (see
pipeline/augment.py). The training step casts and normalises: uint8 is a quarter of fp32's bytes.
"""

# DALI makes its types and operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.augment import AugmentConfig, draws_in_graph
from pipeline.decode import DecodeOptions, capability_of, decode_arguments
from pipeline.sources.header import format_of

NDIM = {"roi_start": 1, "roi_end": 1, "color": 2, "color_mean": 2, "sigma": 0, "solarize": 0}


class Settings(TypedDict):
    """Of every pipeline. device_id None places all on the CPU."""

    batch_size: int
    prefetch: int
    num_threads: int
    device_id: int | None


def build_view_pipeline(
    options: DecodeOptions,
    views: Sequence[AugmentConfig],
    *,
    colors: bool,
    **settings: Unpack[Settings],
) -> Pipeline:
    """The training graph. Inputs: "encoded" and, for each view v, "<name of a draw>_<v>".

    Shapes: an output (N, size, size, 3) uint8 for each view. Without `colors` the views are only
    cropped, and the colour draws are no inputs.
    """
    placement = "cpu" if settings["device_id"] is None else "gpu"

    def outputs(image):
        made = []
        for number, config in enumerate(views):
            draw = {
                name: draw_input(name, number) for name in draws_in_graph(config, colors=colors)
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
            made.append(view)
        return tuple(made)

    return _build(outputs, options, has_reserve=True, **settings)


def build_eval_pipeline(
    options: DecodeOptions, *, size: int, **settings: Unpack[Settings]
) -> Pipeline:
    """The evaluation graph: a window of each image, antialiased. Inputs: encoded and its window.

    Shapes: output (N, size, size, 3) uint8.
    """

    def outputs(image):
        start, end = (
            fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
            for name in ("roi_start", "roi_end")
        )
        return window(image, start, end, size=size)

    return _build(outputs, options, has_reserve=False, **settings)


def _build(
    outputs: Callable, options: DecodeOptions, *, has_reserve: bool, **settings: Unpack[Settings]
) -> Pipeline:
    """The pipeline whose outputs the function makes of the decoded images."""
    device_id, num_threads = settings["device_id"], settings["num_threads"]
    capability = capability_of(device_id)
    decode = decode_arguments(
        options, capability=capability, threads=num_threads, has_reserve=has_reserve
    )

    @pipeline_def(
        batch_size=settings["batch_size"],
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=settings["prefetch"],
        enable_conditionals=True,
    )
    def graph():
        return outputs(fn.decoders.image(encoded_input(), **decode))

    pipeline = graph()
    pipeline.build()
    return pipeline


def encoded_input():
    """The images' bytes, read in place: until their batch is released they must stay unchanged.

    DALI holds no reference: ShareUserData in NVIDIA/DALI,
    dali/pipeline/operator/builtin/input_operator.h.
    """
    return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)


def draw_input(name: str, number: int):
    """A draw of view `number`, fed as "<name>_<number>"; it too is read in place."""
    return fn.external_source(
        name=f"{name}_{number}", dtype=types.FLOAT, ndim=NDIM[name], no_copy=True
    )


def window(image, start, end, *, size: int):
    """The window start .. end of an image, resized to (size, size) with antialiasing.

    In relative coordinates: a window outside the image crashes DALI 2.4 (SIGSEGV), which a header
    that disagrees with the decoder about the size must not.
    """
    common = {"interp_type": types.INTERP_LINEAR, "antialias": True, "roi_relative": True}
    return fn.resize(image, size=(size, size), roi_start=start, roi_end=end, **common)


def color_map(view, color, color_mean, *, placement: str):
    """out = A rgb + B mu with mu the view's mean colour, rounded and clamped to uint8."""
    mean = fn.reductions.mean(view, axes=(0, 1), keep_dims=True)
    shift = fn.coord_transform(mean, M=color_mean)
    if placement == "cpu":
        shift = fn.reshape(shift, shape=[3])
        return fn.coord_transform(view, M=color, T=shift, dtype=types.UINT8)
    # argument inputs must be in host memory: on the GPU the shift is added instead
    return fn.cast(fn.coord_transform(view, M=color) + shift, dtype=types.UINT8)


def undecodable(
    images: Sequence, options: DecodeOptions, *, device_id: int | None
) -> dict[int, str]:
    """The reason, by position, for each image that DALI cannot decode.

    Raises: RuntimeError where the device failed or memory ran out, whatever the image.
    """
    reasons, pipeline = {}, None
    settings: Settings = {
        "batch_size": 1, "prefetch": 1, "num_threads": 1, "device_id": device_id,
    }  # fmt: skip
    for position, encoded in enumerate(images):
        # without a reserve: a GPU in training is full
        pipeline = pipeline or _build(lambda image: image, options, has_reserve=False, **settings)
        pipeline.feed_input("encoded", [encoded])
        try:
            pipeline.run()
        except (RuntimeError, UnicodeDecodeError) as error:
            # DALI names the CUDA API that failed; of the host's memory only bad_alloc
            if "CUDA " in str(error) or "bad_alloc" in str(error):
                raise
            detail = str(error).partition("encountered:\n\n")[2].partition("\n")[0].strip()
            named = f" ({detail})" if detail and not detail.endswith(":") else ""  # a mere heading
            reasons[position] = (
                f"{format_of(encoded)} that DALI cannot decode{named}: damaged, or of a rare kind "
                "to be converted, e.g. magick in.file out.png"
            )
            pipeline = None  # not trusted after an error
    return reasons
