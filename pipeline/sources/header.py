"""Height and width of an encoded image from its bytes, and a refusal of what DALI would choke on.

Stands between pipeline/sources/folder.py (the bytes of one file) and the DALI decoder. There one
bad file raises for its whole batch, often without saying which file it was; so each file is looked
at here first. Only headers are read, nothing is decoded.

What a newcomer gets wrong: a good header is no proof of a good image. Only a full decode shows
damage inside the scan or the tables of a JPEG, inside the pixels of WebP, BMP and TIFF, in the
second page of a TIFF, or a JPEG cut short to which something put an end marker. DALI decodes most
of these to garbage or grey without a word and raises for the rest.

The checks follow the parsers that DALI 2.4 runs before its decoders (nvImageCodec,
src/parsers/*.cpp at 36b4ee8); tests/test_header.py runs DALI on every case.
"""

import struct
import zlib

import numpy as np

# JPEG markers that may stand between start of image and start of scan: tables, APPn, comment.
# libjpeg or DALI's parser fail on all others; SOF is handled apart.
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MAX_SIDE = 65500  # libjpeg's own limit, below the 65535 that the header can say

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_MAX_SIDE = 1_000_000  # libpng's limit
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
# Bit depths allowed per PNG colour type: grey, RGB, palette, grey + alpha, RGBA.
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

# (compression, bits per pixel) of BMP: plain, RLE8 and bit fields.
_BMP_KINDS = {(0, 1), (0, 4), (0, 8), (0, 24), (0, 32), (1, 8), (3, 16), (3, 32)}

_TIFF_DTYPES = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 256, 257, 258, 262, 277
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)  # offsets, byte counts
_TIFF_TAGS = {_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES}
_TIFF_TAGS |= {*_TIFF_STRIPS, *_TIFF_TILES, 320, 347}  # and the palette and the JPEG tables

_OTHER_STARTS = (
    (b"GIF8", "unsupported image format (GIF)"),
    (b"\x00\x00\x00\x0cjP", "unsupported image format (JPEG 2000)"),
    (b"\xff\x4f\xff\x51", "unsupported image format (JPEG 2000)"),
    (b"\x00\x00\x00\x0cJXL", "unsupported image format (JPEG XL)"),
    (b"\xff\x0a", "unsupported image format (JPEG XL)"),
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
    """Return (height, width) of an encoded JPEG, PNG, WebP, BMP or TIFF, told by its content.

    As stored: the EXIF orientation is not applied, as in torchvision's ImageFolder (DALI decodes
    with adjust_orientation=False). 3 us for a 100 kB JPEG and 94 us for a 370 kB PNG, nearly all
    of it the checksum (Python 3.11, a 2-core VM, best of 7 x 2000; PIL's open: 20 and 11 us).

    Shapes   data: (N,) uint8, contiguous.
    Raises   BadImage, and nothing else whatever the bytes.
    """
    if len(data) == 0:
        raise BadImage("empty file")
    view = memoryview(data) if isinstance(data, bytes) else data.data
    assert view.format == "B" and view.ndim == 1 and view.contiguous
    signature = bytes(view[:12])
    if signature[:2] == b"\xff\xd8":
        kind, read_size = "JPEG", _jpeg_size
    elif signature[:8] == _PNG_SIGNATURE:
        kind, read_size = "PNG", _png_size
    elif signature[:4] == b"RIFF" and signature[8:] == b"WEBP":
        kind, read_size = "WebP", _webp_size
    elif signature[:2] == b"BM":
        kind, read_size = "BMP", _bmp_size
    elif signature[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        kind, read_size = "TIFF", _tiff_size
    else:
        raise BadImage(_unknown_reason(bytes(view[:512]), len(view)))
    try:
        height, width = read_size(view)
    except (IndexError, struct.error):  # all reads are bounds checked: the file ends too early
        raise BadImage(f"truncated {kind}: ends inside its header") from None
    if height < 1 or width < 1:
        raise BadImage(f"corrupt {kind}: image of {width}x{height} pixels")
    if height * width > max_pixels:
        raise BadImage(f"image of {width}x{height} pixels exceeds the limit of {max_pixels}")
    return height, width


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
    # Nearly all files end in the marker; the search is for those with bytes behind it. It starts
    # at the scan, for an EXIF thumbnail has an end marker of its own, and not at a fixed share of
    # the file, for a phone's "motion photo" has a video behind it that is larger than the image.
    if view[-2:] != b"\xff\xd9" and bytes(view[position:]).rfind(b"\xff\xd9") < 0:
        raise BadImage("truncated JPEG: no end-of-image marker")
    return size


def _jpeg_frame_size(view: memoryview, position: int, length: int) -> tuple[int, int]:
    marker = view[position + 1]
    # SOF9 is real but rare, and DALI decodes it; a damaged Huffman file marked so decodes to
    # garbage in silence, hence refused. The other types DALI cannot decode.
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
    length, name, width, height, depth, color, *methods = struct.unpack_from(">I4sII5B", view, 8)
    if name != b"IHDR" or length != 13:
        raise BadImage("corrupt PNG: does not start with IHDR")
    if depth not in _PNG_DEPTHS.get(color, ()) or methods[:2] != [0, 0] or methods[2] > 1:
        raise BadImage(f"corrupt PNG: {depth} bits of colour type {color}")
    if max(height, width) > _PNG_MAX_SIDE:
        raise BadImage(f"unsupported PNG: {width}x{height} pixels, a side over {_PNG_MAX_SIDE}")
    seen = set()
    position = 8
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        if end > len(view):
            raise BadImage("truncated PNG: no IEND chunk")
        # A capital first letter marks a chunk without which there is no image; libpng fails on
        # those it does not know and on a wrong checksum, which costs 0.25 us a kB to find out.
        if name[0] < 0x60:
            if name not in _PNG_CRITICAL:
                raise BadImage(f"corrupt PNG: chunk named {name.hex(' ')}")
            checksum = struct.unpack_from(">I", view, end - 4)[0]
            if name != b"IEND" and zlib.crc32(view[position + 4 : end - 4]) != checksum:
                raise BadImage(f"corrupt PNG: checksum of {name.decode()}")
        seen.add(name)
        position = end
    if b"IDAT" not in seen or (color == 3 and b"PLTE" not in seen):
        raise BadImage("corrupt PNG: no image data or no palette")
    return height, width


def _webp_size(view: memoryview) -> tuple[int, int]:
    riff_end = 8 + struct.unpack_from("<I", view, 4)[0]
    if riff_end > len(view):
        raise BadImage(f"truncated WebP: {len(view)} of {riff_end} bytes")
    size = None
    position = 12
    while position + 8 <= riff_end:
        name, length = struct.unpack_from("<4sI", view, position)
        start = position + 8
        if start + length > riff_end:
            raise BadImage("corrupt WebP: a chunk larger than the file")
        if name == b"VP8X" and size is None:
            size = 1 + _uint24(view, start + 7), 1 + _uint24(view, start + 4)
        elif name == b"VP8 ":
            sync, width, height = struct.unpack_from("<3sHH", view, start + 3)
            if sync != b"\x9d\x01\x2a":
                raise BadImage("corrupt WebP: no VP8 key frame")
            return size or (height & 0x3FFF, width & 0x3FFF)
        elif name == b"VP8L":
            mark, bits = struct.unpack_from("<BI", view, start)
            if mark != 0x2F:
                raise BadImage("corrupt WebP: no VP8L signature")
            return size or (1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF))
        elif name == b"ANMF" and size is not None:  # animation: DALI decodes the first frame
            return size
        position = start + length + length % 2
    raise BadImage("corrupt WebP: no image chunk")


def _uint24(view: memoryview, position: int) -> int:
    return int.from_bytes(view[position : position + 3], "little")


def _bmp_size(view: memoryview) -> tuple[int, int]:
    pixels_start, header_length = struct.unpack_from("<II", view, 10)
    if header_length == 12:
        width, height, _, depth = struct.unpack_from("<4H", view, 18)
        compression = 0
    elif header_length >= 40:
        width, height, _, depth, compression = struct.unpack_from("<iiHHI", view, 18)
    else:
        raise BadImage(f"corrupt BMP: header of {header_length} bytes")
    if (compression, depth) not in _BMP_KINDS:
        raise BadImage(f"unsupported BMP: compression {compression} of {depth} bits per pixel")
    height = abs(height)  # negative: rows from the top down
    # The size field at byte 2 is not used: writers leave it 0 or wrong and DALI does not read it.
    row_length = (width * depth + 31) // 32 * 4
    num_bytes = 0 if compression == 1 else row_length * height
    end = max(pixels_start + num_bytes, 14 + header_length)
    if end > len(view):
        raise BadImage(f"truncated BMP: {len(view)} of {end} bytes")
    return height, width


def _tiff_size(view: memoryview) -> tuple[int, int]:
    tags = _tiff_tags(view)
    if any(tags.get(tag, np.empty(0)).size < 1 for tag in (_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH)):
        # DALI wants BitsPerSample too, which the standard lets a bilevel image leave out.
        raise BadImage("unsupported TIFF: no ImageWidth, ImageLength or BitsPerSample")
    if _TIFF_SAMPLES not in tags and tags.get(_TIFF_PHOTOMETRIC, np.array([2]))[0] not in (0, 1, 3):
        raise BadImage("unsupported TIFF: no SamplesPerPixel")
    offsets_tag, counts_tag = _TIFF_TILES if _TIFF_TILES[0] in tags else _TIFF_STRIPS
    offsets = tags.get(offsets_tag, np.empty(0))
    if offsets.size < 1:
        raise BadImage("corrupt TIFF: neither strips nor tiles")
    counts = tags.get(counts_tag, np.zeros_like(offsets))
    # In Python's integers, for a 64-bit sum of the two may wrap around.
    ends = [int(o) + int(c) for o, c in zip(offsets, counts, strict=False)]
    if max(ends, default=0) > len(view):
        raise BadImage(f"truncated TIFF: {len(view)} of {max(ends)} bytes")
    return int(tags[_TIFF_HEIGHT][0]), int(tags[_TIFF_WIDTH][0])


def _tiff_tags(view: memoryview) -> dict[int, np.ndarray]:
    """Values of the tags in _TIFF_TAGS of the first image, of classic TIFF and BigTIFF."""
    order = "<" if view[0] == 0x49 else ">"
    if 43 in (view[2], view[3]):
        start_at, start_code, count_code, entry_code, inline = 8, "Q", "Q", "HHQ", 8
    else:
        start_at, start_code, count_code, entry_code, inline = 4, "I", "H", "HHI", 4
    start = struct.unpack_from(order + start_code, view, start_at)[0]
    if start >= len(view):
        raise BadImage(f"truncated TIFF: its directory is at byte {start} of {len(view)}")
    count = struct.unpack_from(order + count_code, view, start)[0]
    position = start + struct.calcsize(order + count_code)
    value_at = struct.calcsize(order + entry_code)
    # Behind the entries stands the offset of the next directory; libtiff insists on it.
    if position + count * (value_at + inline) + inline > len(view):
        raise BadImage(f"truncated TIFF: directory of {count} entries")
    tags = {}
    for entry in range(position, position + count * (value_at + inline), value_at + inline):
        tag, code, num_values = struct.unpack_from(order + entry_code, view, entry)
        if tag not in _TIFF_TAGS:
            continue
        if code not in _TIFF_DTYPES:
            raise BadImage(f"corrupt TIFF: tag {tag} of type {code}")
        dtype = np.dtype(order + _TIFF_DTYPES[code])
        value_start = entry + value_at
        if num_values * dtype.itemsize > inline:
            value_start = struct.unpack_from(order + start_code, view, value_start)[0]
        if value_start + num_values * dtype.itemsize > len(view):
            raise BadImage(f"truncated TIFF: values of tag {tag} lie behind its end")
        tags[tag] = np.frombuffer(view, dtype, num_values, value_start)
    return tags


def _unknown_reason(head: bytes, num_bytes: int) -> str:
    for start, reason in _OTHER_STARTS:
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
