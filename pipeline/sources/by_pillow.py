"""What Pillow does for DALI: the headers of rare formats, and pixels that DALI would misread.

Without an error DALI 2.4 makes TIFF files of gray and alpha green, those of planes striped, CIELAB
another colour and floats beyond 1 white. It fails for TIFF files of 2 or 4 bits, of 16-bit CMYK or
LZMA, and for BMP files of 16 bits. Pillow reads most of these; the others are refused, with the
command that converts them. tests/test_odd_images.py compares the pixels of each kind.

What DALI's parser refuses must not reach it: it raises while its threads still work on the other
images of the batch, and freeing the pipeline then crashes the process (DALI 2.4, a batch with one
large image). The checks follow nvImageCodec's src/parsers/ at 3a7ac73; it refuses no JPEG or PNG
file that header.py accepts.
"""

import io
import struct
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
_TIFF_SINGLE = (256, 257, 262, _ORIENTATION, 277, 278, 322, 323)  # tags of one integer
_TIFF_NOT_ZERO = (256, 257, 278, 322, 323)
_TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # types of these, as struct has them


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
    by_pillow = not _exif_is_at_hand(file.getbuffer())
    return Header(image.height, image.width, by_pillow=by_pillow, several=image.n_frames > 1), 0


def _exif_is_at_hand(view: memoryview) -> bool:
    """Whether DALI's parser reaches the EXIF chunk of a WebP file that announces one.

    It takes chunks of an odd size to have no padding.
    """
    if view[12:16] != b"VP8X" or not view[20] & 8:
        return True
    position = 12
    while position + 8 <= len(view):
        name, size = struct.unpack_from("<4sI", view, position)
        position += 8 + size
        if name == b"EXIF":
            return position <= len(view)
    return False


def _raw_header(plugin: Any, file: io.BytesIO) -> tuple[Header, int]:
    """Of a BMP or PNM file, and where its pixels end."""
    image = plugin(file)
    codec, _, offset, arguments = image.tile[0]
    if image.format == "BMP":
        size, bits, colors = struct.unpack_from("<I10xH16xI", file.getbuffer(), 14)
        if bits <= 8 and size > 12 and colors > 1 << bits:
            raise BadImage(f"corrupt BMP: {colors} colors of {bits} bits")
        by_pillow = codec != "raw" or bits == 16  # for which DALI fails
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
    if not by_pillow:
        _check_directories(file.getbuffer())
    else:
        file.seek(0)
        _refuse_what_pillow_misreads(plugin, file, tags)
    return Header(height, width, by_pillow=by_pillow, several=tags.next != 0), end


def _check_directories(view: memoryview) -> None:
    """Raise BadImage or struct.error for directories of a TIFF file that DALI's parser refuses."""
    order, is_big = "<" if view[:2] == b"II" else ">", view[2:4] in (b"+\0", b"\0+")
    count_format, offset_format = order + "HQ"[is_big], order + "IQ"[is_big]
    head = struct.Struct(f"{order}HH{'IQ'[is_big]}")
    length = head.size + struct.calcsize(offset_format)
    if is_big and struct.unpack_from(order + "HH", view, 4) != (8, 0):
        raise BadImage("corrupt TIFF: offsets are not of 8 bytes")
    (offset,) = struct.unpack_from(offset_format, view, 8 if is_big else 4)
    seen, values = set(), {}
    while offset:
        if offset in seen:
            raise BadImage("corrupt TIFF: its directories are a cycle")
        (count,) = struct.unpack_from(count_format, view, offset)
        begin = offset + struct.calcsize(count_format)
        end = begin + count * length
        if not seen:  # of the first page, which alone is decoded
            for start in range(begin, end, length):
                tag, kind, number = head.unpack_from(view, start)
                if tag in values:  # DALI's parser takes the last, its decoder the first
                    raise BadImage(f"corrupt TIFF: tag {tag} twice")
                if tag in (258, 339):
                    values[tag] = 0
                    if kind != 3:
                        raise BadImage(f"corrupt TIFF: tag {tag} is not of type SHORT")
                elif tag in _TIFF_SINGLE:
                    if number != 1 or kind not in _TIFF_INTEGERS:
                        raise BadImage(f"corrupt TIFF: tag {tag} is not one integer")
                    form = order + _TIFF_INTEGERS[kind]
                    (values[tag],) = struct.unpack_from(form, view, start + head.size)
        seen.add(offset)
        (offset,) = struct.unpack_from(offset_format, view, end)
    if not all(0 < values.get(tag, 1) < 1 << 32 for tag in _TIFF_NOT_ZERO):
        raise BadImage("corrupt TIFF: a size of its strips or tiles is 0 or above 32 bits")
    if sum(tag in values for tag in (322, 323)) + 2 * (278 in values) not in (0, 2):
        raise BadImage("corrupt TIFF: strips and tiles, or tiles without one of their sizes")


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
