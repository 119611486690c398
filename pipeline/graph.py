"""The DALI graphs: encoded images -> uint8 NHWC crops, of each view or one for evaluation.

One function, two placements: on a GPU the decoder is "mixed" and the rest runs there. An image is
decoded once and cropped for each view; flip swaps the window's edges; nothing is random (see
pipeline/augment.py). Colour, blur and solarize follow: on the CPU in pipeline/color_blur.py, on a
GPU in the first op of the training step. uint8 is a quarter of fp32's bytes.
"""

# DALI makes its types and operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions, capability_of, decode_arguments
from pipeline.sources.header import format_of

ROI = "roi_start", "roi_end"


class Settings(TypedDict):
    """Of every pipeline. device_id None places all on the CPU."""

    batch_size: int
    prefetch: int
    num_threads: int
    device_id: int | None


def build_view_pipeline(
    options: DecodeOptions,
    views: Sequence[AugmentConfig],
    **settings: Unpack[Settings],
) -> Pipeline:
    """The training graph. Inputs: "encoded" and, for each view v, "roi_start_<v>", "roi_end_<v>".

    Shapes: an output (N, size, size, 3) uint8 for each view.
    """

    def outputs(image):
        return tuple(
            window(image, *(roi_input(f"{name}_{number}") for name in ROI), size=config.size)
            for number, config in enumerate(views)
        )

    return _build(outputs, options, has_reserve=True, **settings)


def build_eval_pipeline(
    options: DecodeOptions, *, size: int, **settings: Unpack[Settings]
) -> Pipeline:
    """The evaluation graph: a window of each image, antialiased. Inputs: encoded and its window.

    Shapes: output (N, size, size, 3) uint8.
    """

    def outputs(image):
        start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ROI)
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


def roi_input(name: str, **options: bool):
    """Two coordinates of each image, read in place too."""
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=1, no_copy=True, **options)


def window(image, start, end, *, size: int):
    """The window start .. end of an image, resized to (size, size) with antialiasing.

    In relative coordinates: a window outside the image crashes DALI 2.4 (SIGSEGV), which a header
    that disagrees with the decoder about the size must not.
    """
    common = {"interp_type": types.INTERP_LINEAR, "antialias": True, "roi_relative": True}
    return fn.resize(image, size=(size, size), roi_start=start, roi_end=end, **common)


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
