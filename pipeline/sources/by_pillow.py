"""What Pillow does for DALI: the headers of rare formats, and pixels that DALI would misread.

Without an error DALI 2.4 makes TIFF files of gray and alpha green, those of planes striped, CIELAB
another colour and floats beyond 1 white. It fails for TIFF files of 2 or 4 bits, of 16-bit CMYK or
LZMA, and for BMP files of 16 bits. Pillow reads most of these; the others are refused, with the
command that converts them. tests/test_odd_images.py compares the pixels of each kind.
"""

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.sources.header import BadImage, Header, format_of

_TIFF_PARTS = ((273, 279), (324, 325))  # tags: offsets and byte counts of strips, of tiles
_TIFF_CODECS = (1, 5, 7, 8, 32773, 32946, 50000)  # not of fax machines, JPEG of 1992, LZMA ...
_TIFF_COLORS = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"}
_ORIENTATION = 274


def decoded(data: np.ndarray | bytes) -> np.ndarray:
    """The first page in 8-bit gray or RGB, decoded by Pillow; alpha is dropped.

    As stored, like DALI's: the EXIF orientation is not applied.

    Shapes   (num_bytes,) uint8: a binary PNM file, which DALI reads fast.
    Raises   BadImage for what Pillow cannot decode.
    """
    kind = format_of(data)
    try:
        image = _plugins()[kind](io.BytesIO(bytes(data)))
        turned = image.getexif().get(_ORIENTATION, 1) if kind == "TIFF" else 1
        image.load()
        if turned != 1:  # by Pillow, which turns no other format
            image.getexif()[_ORIENTATION] = {6: 8, 8: 6}.get(turned, turned)  # back
            image = ImageOps.exif_transpose(image)
        is_gray = image.mode in ("1", "L", "LA")
        image = image.convert("L" if is_gray else "RGB")
    except Exception as error:  # nearly anything, whatever the bytes
        raise BadImage(f"corrupt or truncated {kind}: {error!r:.60}") from None
    head = b"P%d %d %d 255\n" % (5 if is_gray else 6, *image.size)
    return np.frombuffer(head + image.tobytes(), np.uint8)


def _plugins() -> dict[str, Any]:
    """Pillow's class for each format: Image.open has another limit of pixels."""
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit
    warnings.filterwarnings("ignore", module="PIL")  # about metadata
    return {
        "WebP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "PNM": PpmImagePlugin.PpmImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }


def pillow_header(kind: str, view: memoryview) -> Header:
    """The header of a WebP, BMP, TIFF or PNM image.

    Raises   BadImage, and nothing else whatever the bytes.
    """
    parse = {"WebP": _webp_header, "TIFF": _tiff_header}.get(kind, _raw_header)
    try:
        header, end = parse(_plugins()[kind], io.BytesIO(view))
    except BadImage:
        raise
    except Exception as error:  # nearly anything, whatever the bytes
        raise BadImage(f"corrupt or truncated {kind}: {error!r:.60}") from None
    if end > len(view):
        raise BadImage(f"truncated {kind}: {len(view)} of {end} bytes")
    return header


def _webp_header(plugin: Any, file: io.BytesIO) -> tuple[Header, int]:
    image = plugin(file)
    return Header(image.height, image.width, several=image.n_frames > 1), 0


def _raw_header(plugin: Any, file: io.BytesIO) -> tuple[Header, int]:
    """Of a BMP or PNM file, and where its pixels end."""
    image = plugin(file)
    codec, _, offset, arguments = image.tile[0]
    if image.format == "BMP":
        # DALI fails for 16 bits a pixel
        by_pillow = codec != "raw" or arguments[0] in ("BGR;15", "BGR;16")
        end = offset + arguments[1] * image.height if codec == "raw" else 0  # bytes a row
        return Header(image.height, image.width, by_pillow=by_pillow), end
    if codec != "raw" and arguments != ("RGB", 65535):
        raise BadImage(
            "PNM as text, or of a largest value other than 255 and 65535: convert it, e.g. "
            "magick in.ppm out.png"
        )
    bits = {"1": 1, "L": 8, "I": 16, "RGB": 24 if codec == "raw" else 48}[image.mode]
    return Header(image.height, image.width), offset + -(-image.width * bits // 8) * image.height


def _tiff_header(plugin: Any, file: io.BytesIO) -> tuple[Header, int]:
    """Of a TIFF file, and where its pixels end."""
    head = file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8) if head[2] == 43 else head)
    file.seek(tags.next)
    tags.load(file)  # Pillow's image has no tags where it does not know the kind
    width, height = int(tags[256]), int(tags[257])  # Pillow's size has the orientation applied
    offsets, counts = (tags[tag] for tag in _TIFF_PARTS[324 in tags])
    end = max(map(sum, zip(offsets, counts, strict=False)))
    by_pillow = not _is_dalis(tags)
    if by_pillow:
        file.seek(0)
        _refuse_what_pillow_misreads(plugin, file, tags)
    return Header(height, width, by_pillow=by_pillow, several=tags.next != 0), end


def _is_dalis(tags: Mapping[Any, Any]) -> bool:
    """Whether DALI reads a TIFF file right: gray, RGB and RGBA of 8 or 16 bits, pixel by pixel."""
    color, samples, codec = tags.get(262), tags.get(277, 1), tags.get(259, 1)
    bits, is_chunky, is_premultiplied = (
        {*tags.get(258, ())},
        tags.get(284, 1) == 1,
        1 in tags.get(338, ()),
    )
    if {*tags.get(339, (1,))} != {1} or codec not in _TIFF_CODECS:
        return False
    if (color, samples) == (1, 1):
        return bits in ({8}, {12}, {16})
    is_rgb = color == 2 and samples in (3, 4) and is_chunky and not is_premultiplied
    return bits in ({8}, {16}) and (is_rgb or (color, samples, codec) == (6, 3, 7))


def _refuse_what_pillow_misreads(plugin: Any, file: io.BytesIO, tags: Mapping[Any, Any]) -> None:
    color, samples, is_chunky = tags[262], tags.get(277, 1), tags.get(284, 1) == 1
    form, depth = max(tags.get(339, (1,))), max(tags.get(258, (1,)))
    if form != 1 or depth > 16:
        kind = {2: "signed integers", 3: "floats"}.get(form, "integers")
        raise BadImage(
            f"TIFF of {depth}-bit {kind}: convert it to 8 or 16 bits, e.g. "
            "magick in.tif -auto-level -depth 8 out.png"
        )
    try:
        mode = plugin(file).mode
    except Exception:  # a kind that it does not know
        mode = ""
    if mode in ("RGB", "RGBA", "CMYK"):
        is_read = is_chunky or depth <= 8
    else:
        is_read = mode in ("1", "L", "LA", "P", "PA", "YCbCr") and is_chunky and depth <= 8
    if color == 3 and max(tags.get(320, (0,))) < 256:  # a map of 8 bits, almost black to Pillow
        is_read = False
    if not is_read:
        name = _TIFF_COLORS.get(color, f"photometric interpretation {color}")
        raise BadImage(
            f"TIFF of {name}, {samples} x {depth} bits: convert it, e.g. magick in.tif -alpha off "
            "-colorspace sRGB -depth 8 out.png"
        )
