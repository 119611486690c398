"""Height and width of an encoded image from its bytes, and refusal of what DALI would fail on.

One image that DALI cannot decode fails its whole batch, so each file is checked before. Only
headers are read: damage inside the pixels shows in a full decode alone. DALI decodes most of it to
garbage or gray without an error; where it raises, pipeline/loader.py finds and replaces the image.

The JPEG checks follow the parser that DALI 2.4 runs before its decoder (nvImageCodec,
src/parsers/jpeg.cpp at 36b4ee8); tests/test_header.py runs DALI on every case.
"""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np

# Allowed between start of image and start of scan beside SOF: tables, APPn, comment.
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MAX_SIDE = 65500  # libjpeg's own limit, below the 65535 that the header can hold
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_TIFF_PARTS = ((273, 279), (324, 325))  # tags: offsets and byte counts of strips, of tiles
_KINDS = (
    ("JPEG", b"\xff\xd8"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("WebP", b"RIFF"),
    ("BMP", b"BM"),
    ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
_OTHER_KINDS = (
    (b"GIF8", "unsupported image format (GIF)"),
    ((b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51"), "unsupported image format (JPEG 2000)"),
    ((b"\x00\x00\x00\x0cJXL", b"\xff\x0a"), "unsupported image format (JPEG XL)"),
    (b"8BPS", "unsupported image format (Photoshop)"),
    (b"version https://git-lfs", "not an image (git-LFS pointer: run git lfs pull)"),
    (b"\x00\x05\x16\x07", "not an image (macOS ._ file)"),
    (b"%PDF", "not an image (PDF)"),
    (b"PK\x03\x04", "not an image (zip archive)"),
    (b"\x1f\x8b", "not an image (gzip archive)"),
)


class BadImage(ValueError):
    """One file cannot be used as an image; str() is the short reason, to count and to log."""


def image_size(data: np.ndarray | bytes, *, max_pixels: int = 1 << 27) -> tuple[int, int]:
    """Return (height, width) of an encoded JPEG, PNG, WebP, BMP or TIFF, identified by content.

    As stored: the EXIF orientation is not applied, as in torchvision's ImageFolder and by DALI with
    adjust_orientation=False. 3 us for a JPEG of 100 kB (Python 3.11, 2-core VM, best of 7 x 2000).

    Shapes   data: (N,) uint8, contiguous.
    Raises   BadImage, and nothing else whatever the bytes.
    """
    if len(data) == 0:
        raise BadImage("empty file")
    view = memoryview(data) if isinstance(data, bytes) else data.data
    assert view.format == "B" and view.ndim == 1 and view.contiguous
    kind = format_of(view)
    try:
        if kind == "JPEG":
            height, width = _jpeg_size(view)
        else:
            height, width = _png_size(view) if kind == "PNG" else _pillow_size(kind, view)
    except (IndexError, struct.error):
        raise BadImage(f"truncated {kind}: ends inside its header") from None
    if height < 1 or width < 1:
        raise BadImage(f"corrupt {kind}: image of {width}x{height} pixels")
    if height * width > max_pixels:
        size, limit = f"{width}x{height} pixels", f"{max_pixels} (--data.max_pixels)"
        raise BadImage(f"image of {size} exceeds the limit of {limit}")
    return height, width


def format_of(data: np.ndarray | bytes | memoryview) -> str:
    """JPEG, PNG, WebP, BMP or TIFF by an image's first bytes; "" for another."""
    head = bytes(data[:12])
    return next((kind for kind, start in _KINDS if head.startswith(start)), "")


def _jpeg_size(view: memoryview) -> tuple[int, int]:
    size = None
    position = 2
    while True:
        if view[position] != 0xFF:
            raise BadImage(f"corrupt JPEG: no marker at byte {position}")
        marker = view[position + 1]
        if marker == 0xFF:  # fill byte, allowed before any marker
            position += 1
            continue
        if marker == 0xD9:
            raise BadImage("corrupt JPEG: header without scan")
        length = view[position + 2] << 8 | view[position + 3]
        if marker in _JPEG_SOF:
            if size is not None:
                raise BadImage("corrupt JPEG: two frame headers")
            size = _jpeg_frame_size(view, position, length)
        elif marker == 0xDA:
            break
        elif marker not in _JPEG_SEGMENTS or length < 2:
            raise BadImage(f"corrupt JPEG: marker FF{marker:02X} in the header")
        position += 2 + length
    if size is None:
        raise BadImage("corrupt JPEG: scan without frame header")
    # The search is for files with bytes behind the marker, such as a phone's video. It starts at
    # the scan because an EXIF thumbnail has an end marker too.
    if view[-2:] != b"\xff\xd9" and bytes(view[position:]).rfind(b"\xff\xd9") < 0:
        raise BadImage("truncated JPEG: no end-of-image marker")
    return size


def _jpeg_frame_size(view: memoryview, position: int, length: int) -> tuple[int, int]:
    marker = view[position + 1]
    # DALI decodes SOF9 (arithmetic coding, rare), but also a damaged Huffman file marked so, to
    # garbage without an error. It cannot decode the other types.
    if marker > 0xC2:
        raise BadImage(f"unsupported JPEG: type SOF{marker - 0xC0}, only SOF0, SOF1, SOF2 are read")
    precision, height, width, num_components = struct.unpack_from(">BHHB", view, position + 4)
    if precision != 8:
        raise BadImage(f"unsupported JPEG: {precision} bits per sample, only 8 are read")
    if num_components not in (1, 3, 4) or length != 8 + 3 * num_components:
        raise BadImage(f"corrupt JPEG: frame header of {num_components} components")
    if max(height, width) > _JPEG_MAX_SIDE:
        raise BadImage(f"unsupported JPEG: {width}x{height} pixels, a side over {_JPEG_MAX_SIDE}")
    return height, width


def _png_size(view: memoryview) -> tuple[int, int]:
    seen: set[bytes] = set()
    position, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        if end > len(view):
            raise BadImage("truncated PNG: no IEND chunk")
        (checksum,) = struct.unpack_from(">I", view, end - 4)
        # libpng fails for an unknown chunk or a wrong checksum if the first letter is a capital;
        # Pillow refuses a wrong checksum of a comment too, which DALI skips
        if name[0] < 0x60:
            if name not in _PNG_CRITICAL:
                raise BadImage(f"corrupt PNG: chunk named {name.hex(' ')}")
            if zlib.crc32(view[position + 4 : end - 4]) != checksum:
                raise BadImage(f"corrupt PNG: checksum of {name.decode()}")
        seen.add(name)
        position = end
    if not {b"IHDR", b"IDAT"} <= seen:
        raise BadImage("corrupt PNG: no header or no image data")
    width, height = struct.unpack_from(">II", view, 16)
    return height, width


def _pillow_size(kind: str, view: memoryview) -> tuple[int, int]:
    """By Pillow's plugin of the format, since Image.open has another limit of pixels."""
    if not kind:
        raise BadImage(_unknown_reason(bytes(view[:512]), len(view)))
    from PIL import BmpImagePlugin, Image, TiffImagePlugin, WebPImagePlugin  # slow to import

    Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit
    warnings.filterwarnings("ignore", module="PIL")  # about metadata
    end = 0
    try:
        if kind == "WebP":
            width, height = WebPImagePlugin.WebPImageFile(io.BytesIO(view)).size
        elif kind == "BMP":
            image = BmpImagePlugin.BmpImageFile(io.BytesIO(view))
            width, height = image.size
            tile: Any = image.tile[0]  # codec, box, offset, (mode, bytes a row, direction)
            end = tile[2] + tile[3][1] * height if tile[0] == "raw" else 0
        else:
            tags = TiffImagePlugin.TiffImageFile(io.BytesIO(view)).tag_v2
            width, height = tags[256], tags[257]  # Pillow's size has the EXIF orientation applied
            offsets, counts = (tags.get(tag, ()) for tag in _TIFF_PARTS[324 in tags])
            end = max(map(sum, zip(offsets, counts, strict=False)), default=0)
    except Exception as error:  # nearly anything, whatever the bytes
        raise BadImage(f"corrupt or truncated {kind}: {error!r:.60}") from None
    if end > len(view):
        raise BadImage(f"truncated {kind}: {len(view)} of {end} bytes")
    return height, width


def _unknown_reason(head: bytes, num_bytes: int) -> str:
    for start, reason in _OTHER_KINDS:
        if head.startswith(start):
            return reason
    if head[4:8] == b"ftyp":
        return "unsupported image format (HEIF, AVIF or video)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<!doctype html") or b"<html" in text:
        return "not an image (HTML)"
    if text.startswith((b"<?xml", b"<svg")):
        return "not an image (XML or SVG)"
    if num_bytes > 16 and text.isascii() and b"\0" not in text:
        return "not an image (text)"
    if not any(head):
        return f"not an image (starts with zeros, {num_bytes} bytes)"
    return f"not an image (starts with {head[:8].hex(' ')}, {num_bytes} bytes)"
