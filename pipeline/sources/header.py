"""The header of an encoded image: its size, who decodes it, and refusal of what nobody can.

One image that DALI cannot decode fails its whole batch, so each file is checked before. Only
headers are read: damage inside the pixels shows in a full decode alone. DALI decodes most of it to
garbage or gray without an error; where it raises, pipeline/loader.py finds and replaces the image.

A few rare kinds DALI misreads without an error, such as gray TIFF files with alpha. Pillow decodes
these first (by_pillow.py), or they are refused where the file does not give its values' range.

The JPEG checks follow the parser that DALI 2.4 runs before its decoder (nvImageCodec,
src/parsers/jpeg.cpp at 36b4ee8); tests/test_header.py runs DALI on every case.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

# Allowed between start of image and start of scan beside SOF: tables, APPn, comment.
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MAX_SIDE = 65500  # libjpeg's own limit, below the 65535 that the header can hold
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_KINDS = (
    ("JPEG", b"\xff\xd8"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("WebP", b"RIFF"),
    ("BMP", b"BM"),
    ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("PNM", tuple(b"P%d%c" % (kind, space) for kind in range(1, 7) for space in b" \t\r\n#")),
)
_OTHER_KINDS = (
    (b"GIF8", "unsupported image format (GIF)"),
    ((b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51"), "unsupported image format (JPEG 2000)"),
    ((b"\x00\x00\x00\x0cJXL", b"\xff\x0a"), "unsupported image format (JPEG XL)"),
    ((b"P7\n", b"PF\n", b"Pf\n"), "unsupported image format (PAM or PFM)"),
    (b"8BPS", "unsupported image format (Photoshop)"),
    (b"version https://git-lfs", "not an image (git-LFS pointer: run git lfs pull)"),
    (b"\x00\x05\x16\x07", "not an image (macOS ._ file)"),
    (b"%PDF", "not an image (PDF)"),
    (b"PK\x03\x04", "not an image (zip archive)"),
    (b"\x1f\x8b", "not an image (gzip archive)"),
)


class BadImage(ValueError):
    """One file cannot be used as an image; str() is the short reason, to count and to log."""


class Header(NamedTuple):
    """What the header of an image says."""

    height: int
    width: int
    by_pillow: bool = False  # DALI would misread it: by_pillow.decoded first
    several: bool = False  # it has further pages or frames, which are not used


def read_header(data: np.ndarray | bytes, *, max_pixels: int = 1 << 27) -> Header:
    """Return the header of a JPEG, PNG, WebP, BMP, TIFF or PNM image, identified by content.

    Sizes are as stored: the EXIF orientation is not applied, as in torchvision's ImageFolder and by
    DALI with adjust_orientation=False. 3 us for a JPEG of 100 kB (Python 3.11, 2-core VM, best of
    7 x 2000).

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
            header = _jpeg_header(view)
        else:
            header = _png_header(view) if kind == "PNG" else _other_header(kind, view)
    except (IndexError, struct.error):
        raise BadImage(f"truncated {kind}: ends inside its header") from None
    if header.height < 1 or header.width < 1:
        raise BadImage(f"corrupt {kind}: image of {header.width}x{header.height} pixels")
    if header.height * header.width > max_pixels:
        size, limit = f"{header.width}x{header.height}", f"{max_pixels} (--data.max_pixels)"
        raise BadImage(f"image of {size} pixels exceeds the limit of {limit}")
    return header


def format_of(data: np.ndarray | bytes | memoryview) -> str:
    """JPEG, PNG, WebP, BMP, TIFF or PNM by an image's first bytes; "" for another."""
    head = bytes(data[:12])
    return next((kind for kind, start in _KINDS if head.startswith(start)), "")


def _jpeg_header(view: memoryview) -> Header:
    frame, is_adobe = None, False
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
            if frame is not None:
                raise BadImage("corrupt JPEG: two frame headers")
            frame = _jpeg_frame(view, position, length)
        elif marker == 0xDA:
            break
        elif marker not in _JPEG_SEGMENTS or length < 2:
            raise BadImage(f"corrupt JPEG: marker FF{marker:02X} in the header")
        elif marker == 0xEE:
            is_adobe |= view[position + 4 : position + 9] == b"Adobe"
        position += 2 + length
    if frame is None:
        raise BadImage("corrupt JPEG: scan without frame header")
    # The search is for files with bytes behind the marker, such as a phone's video. It starts at
    # the scan because an EXIF thumbnail has an end marker too.
    if view[-2:] != b"\xff\xd9" and bytes(view[position:]).rfind(b"\xff\xd9") < 0:
        raise BadImage("truncated JPEG: no end-of-image marker")
    height, width, num_components = frame
    if num_components == 4 and not is_adobe:  # Pillow takes it for inverted, DALI does not
        raise BadImage(
            "CMYK JPEG without Adobe's marker, so inverted or not: convert it, e.g. "
            "magick in.jpg -colorspace sRGB out.jpg"
        )
    return Header(height, width)


def _jpeg_frame(view: memoryview, position: int, length: int) -> tuple[int, int, int]:
    """(height, width, number of components)."""
    marker = view[position + 1]
    # DALI decodes arithmetic coding (rare), but also a damaged Huffman file marked so, to garbage
    # without an error. It cannot decode the other types.
    if marker in (0xC9, 0xCA):
        raise BadImage(
            "JPEG of arithmetic coding: convert it without loss, jpegtran in.jpg > out.jpg"
        )
    if marker > 0xC2:
        raise BadImage(f"unsupported JPEG: type SOF{marker - 0xC0}, only SOF0, SOF1, SOF2 are read")
    precision, height, width, num_components = struct.unpack_from(">BHHB", view, position + 4)
    if precision != 8:
        raise BadImage(
            f"JPEG of {precision} bits per sample: convert it to 8, e.g. by libjpeg-turbo 3, "
            "djpeg in.jpg | magick - out.png"
        )
    if num_components not in (1, 3, 4) or length != 8 + 3 * num_components:
        raise BadImage(f"corrupt JPEG: frame header of {num_components} components")
    if max(height, width) > _JPEG_MAX_SIDE:
        raise BadImage(f"unsupported JPEG: {width}x{height} pixels, a side over {_JPEG_MAX_SIDE}")
    return height, width, num_components


def _png_header(view: memoryview) -> Header:
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
    return Header(height, width, several=b"acTL" in seen)


def _other_header(kind: str, view: memoryview) -> Header:
    if not kind:
        raise BadImage(_unknown_reason(bytes(view[:512]), len(view)))
    from pipeline.sources.by_pillow import pillow_header  # slow to import

    return pillow_header(kind, view)


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
