"""Kinds of images that decoders misread without an error: right by another decoder, or refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.pack import check
from pipeline.sources.by_pillow import decoded
from pipeline.sources.folder import list_images
from pipeline.sources.header import BadImage, read_header
from pipeline.sources.reader import ImageReader
from test_header import BMP, GOOD, JPEG, RGB, SOF, dali_decode, encode, patched

COLORS = np.asarray(RGB)
HEIGHT, WIDTH = COLORS.shape[:2]
GRAY = np.asarray(RGB.convert("L"))
ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
CMYK = np.asarray(RGB.convert("CMYK"))
GRAY_KIND, RGB_KIND, PALETTE_KIND, CMYK_KIND, LAB_KIND = 1, 2, 3, 5, 8  # PhotometricInterpretation
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat


def tiff(
    *planes: np.ndarray, kind: int, bits: int = 0, form: int = UNSIGNED, **tags: list[int]
) -> bytes:
    """An uncompressed TIFF file: a strip for each plane; tags as t338=[2].

    Shapes   planes: (H, W, samples) or (H, W). With bits (1 .. 4) values of so many are packed.
    """
    samples = sum(plane.shape[2] if plane.ndim == 3 else 1 for plane in planes)
    depth = bits or planes[0].itemsize * 8
    strips = [packed(plane, bits) if bits else plane.tobytes() for plane in planes]
    fields = {
        256: [WIDTH], 257: [HEIGHT], 258: [depth] * samples, 259: [1], 262: [kind], 277: [samples],
        278: [HEIGHT], 279: [len(strip) for strip in strips], 284: [min(len(planes), 2)],
        339: [form] * samples, **{int(name[1:]): values for name, values in tags.items()},
    }  # fmt: skip
    start = 8 + 2 + 12 * (len(fields) + 1) + 4
    ends = np.cumsum([0, *map(len, strips)])
    offset = start + sum(4 * len(values) for values in [*fields.values(), strips])
    fields[273] = [int(offset + end) for end in ends[:-1]]
    directory, outside = struct.pack("<H", len(fields)), b""
    for tag, values in sorted(fields.items()):
        is_long = tag in (256, 257, 273, 278, 279)
        data = struct.pack(f"<{len(values)}{'I' if is_long else 'H'}", *values)
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", start + len(outside))
        outside += data if len(data) > 4 else b""
        directory += struct.pack("<HHI", tag, 4 if is_long else 3, len(values)) + place
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + outside
    return head.ljust(offset, b"\0") + b"".join(strips)


def packed(values: np.ndarray, bits: int) -> bytes:
    each = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=2)
    return np.packbits(each[:, :, 16 - bits :].reshape(HEIGHT, -1), axis=1).tobytes()


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]


def bmp_of_16_bits() -> bytes:
    r, g, b = (COLORS[..., channel].astype("<u2") >> 3 for channel in range(3))
    pixels = (r << 10 | g << 5 | b)[::-1].tobytes()  # of a width that needs no padding
    return patched(patched(BMP[:54], 28, b"\x10"), 34, struct.pack("<I", len(pixels))) + pixels


def webp_of_an_odd_profile() -> bytes:
    """The padding behind its profile is no part of a chunk."""
    exif = Image.Exif()
    exif[274] = 1
    options: dict = {"icc_profile": b"profile", "exif": exif, "lossless": True}
    return encode(RGB, "WEBP", **options)


def right_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """Images of which DALI alone makes other pixels, or none, and the pixels that are right."""
    wide = np.uint16(257)
    cases = {
        "tiff gray and alpha": (tiff(np.dstack([GRAY, ALPHA]), kind=GRAY_KIND, t338=[2]), GRAY),
        "tiff two bands": (tiff(np.dstack([GRAY, ALPHA]), kind=GRAY_KIND, t338=[0]), GRAY),
        "tiff white is zero": (tiff(255 - GRAY, kind=0), GRAY),
        "tiff 4 bits": (tiff(GRAY >> 4, kind=GRAY_KIND, bits=4), (GRAY >> 4) * 17),
        "tiff 2 bits": (tiff(GRAY >> 6, kind=GRAY_KIND, bits=2), (GRAY >> 6) * 85),
        "tiff 12 bits": (tiff(GRAY * np.uint16(16), kind=GRAY_KIND, bits=12), GRAY),
        "tiff planes": (tiff(*np.moveaxis(COLORS, 2, 0), kind=RGB_KIND), COLORS),
        "tiff planes and alpha": (
            tiff(*np.moveaxis(COLORS, 2, 0), ALPHA, kind=RGB_KIND, t338=[2]), COLORS,
        ),
        "tiff five bands": (
            tiff(np.dstack([COLORS, GRAY, GRAY]), kind=RGB_KIND, t338=[0, 0]), COLORS,
        ),
        "tiff rgb and alpha of 16 bits": (
            tiff(np.dstack([COLORS, ALPHA]) * wide, kind=RGB_KIND, t338=[2]), COLORS,
        ),
        "tiff cmyk of 16 bits": (tiff(CMYK * wide, kind=CMYK_KIND), COLORS),
        "tiff palette and alpha": (
            tiff(np.dstack([GRAY, ALPHA]), kind=PALETTE_KIND, t338=[2],
                 t320=[257 * v for v in (*range(256), *range(255, -1, -1), *range(256))]),
            np.dstack([GRAY, 255 - GRAY, GRAY]),
        ),
        "tiff lzma": (encode(RGB, "TIFF", compression="lzma"), COLORS),
        "webp of an odd profile": (webp_of_an_odd_profile(), COLORS),
        "bmp of 16 bits": (bmp_of_16_bits(), (COLORS >> 3) * 255.0 / 31),
    }  # fmt: skip
    for turn in range(2, 9):
        data = tiff(np.dstack([GRAY, ALPHA]), kind=GRAY_KIND, t338=[2], t274=[turn])
        cases[f"tiff gray and alpha, orientation {turn}"] = data, GRAY
    return cases


def refused_cases() -> dict[str, tuple[bytes, str]]:
    """Images that DALI and Pillow misread, and what is said of them."""
    png = "out.png$"
    return {
        "float": (
            tiff((GRAY * 10.0).astype("<f4"), kind=GRAY_KIND, form=FLOAT),
            f"^TIFF of 32-bit floats: convert it to 8 or 16 bits, e.g. magick in.tif .*{png}",
        ),
        "int16": (
            tiff(GRAY.astype("<i2"), kind=GRAY_KIND, form=SIGNED),
            f"^TIFF of 16-bit signed integers: convert it to 8 or 16 bits, .*{png}",
        ),
        "uint32": (tiff(COLORS.astype("<u4"), kind=RGB_KIND), "^TIFF of 32-bit integers: convert"),
        "lab": (tiff(COLORS, kind=LAB_KIND), f"^TIFF of CIELAB, 3 x 8 bits: convert it, .*{png}"),
        "gray and alpha of 16 bits": (
            tiff(np.dstack([GRAY, ALPHA]).astype("<u2"), kind=GRAY_KIND, t338=[2]),
            f"^TIFF of gray, 2 x 16 bits: convert it, e.g. magick in.tif -alpha off .*{png}",
        ),
        "planes of 16 bits": (
            tiff(*np.moveaxis(COLORS, 2, 0).astype("<u2"), kind=RGB_KIND),
            "^TIFF of RGB, 3 x 16 bits: convert it",
        ),
        "white is zero, 16 bits": (tiff(GRAY.astype("<u2"), kind=0), "^TIFF of gray, 1 x 16 bits"),
        "map of 8 bits": (
            tiff(GRAY, kind=PALETTE_KIND, t320=[*range(256)] * 3), "^TIFF of palette, 1 x 8 bits",
        ),
        "cmyk not of adobe": (
            without_adobe(encode(RGB.convert("CMYK"), "JPEG")),
            "^CMYK JPEG without Adobe's marker, so inverted or not: convert it, .*out.jpg$",
        ),
        "arithmetic": (
            patched(JPEG, SOF + 1, b"\xc9"),
            "^JPEG of arithmetic coding: convert it without loss, jpegtran in.jpg > out.jpg$",
        ),
        "12 bits": (patched(JPEG, SOF + 4, b"\x0c"), f"^JPEG of 12 bits per sample: .*{png}"),
        "pgm of 12 bits": (
            b"P5 %d %d 4095\n" % (WIDTH, HEIGHT) + GRAY.astype(">u2").tobytes(),
            f"^PNM as text, or of a largest value other than 255 and 65535: convert it, .*{png}",
        ),
        "pgm as text": (b"P2 2 1 255\n7 8\n", "^PNM as text"),
    }  # fmt: skip


RIGHT = right_cases()
REFUSED = refused_cases()


@pytest.mark.parametrize("name", RIGHT)
def test_what_dali_misreads_has_the_right_pixels_and_no_alpha(name):
    data, pixels = RIGHT[name]
    found = dali_decode(data)
    assert found is not None and read_header(data)[:2] == found.shape[:2] == (HEIGHT, WIDTH)
    right = pixels if pixels.ndim == 3 else pixels[..., None]
    assert np.abs(found - right.astype(float)).mean() < 1.0


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_decoder_reads_right_is_refused_with_what_converts_it(name):
    data, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason):
        read_header(data)


def test_a_jpeg_of_ycck_is_read_like_pillows():
    cmyk = encode(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95)
    ycck = patched(cmyk, cmyk.index(b"Adobe") + 11, b"\2")
    pillow = np.asarray(Image.open(io.BytesIO(ycck)).convert("RGB")).astype(float)
    found = dali_decode(ycck)
    assert found is not None and np.abs(found - pillow).mean() < 1.0
    assert np.abs(pillow - COLORS).mean() > 10  # that it is another kind


def test_packing_takes_what_a_run_takes_and_gives_the_same_reasons(tmp_path):
    good = {**GOOD, **{name: data for name, (data, _) in RIGHT.items()}}
    for name, data in good.items():
        (tmp_path / f"good {name}.jpg").write_bytes(data)
    for name, (data, _) in REFUSED.items():
        (tmp_path / f"bad {name}.jpg").write_bytes(data)
    folder = list_images(str(tmp_path))
    packed = {number: check(folder, number)[1] for number in range(len(folder))}
    reader = ImageReader(folder)
    reader.read_all(np.arange(len(folder)))
    assert reader.bad == {number: reason for number, reason in packed.items() if reason}
    assert len(reader.bad) == len(REFUSED) and len(folder) == len(REFUSED) + len(good)


def test_the_images_that_have_further_pages_are_counted(tmp_path):
    several = {name: "animated" in name or "two pages" in name for name in GOOD}
    assert {name: read_header(data).several for name, data in GOOD.items()} == several
    for number in range(3):
        (tmp_path / f"{number}.tif").write_bytes(GOOD["tiff" if number == 1 else "tiff two pages"])
    reader = ImageReader(list_images(str(tmp_path)))
    for _ in range(2):
        reader.read_all(np.arange(3))
    assert reader.several == (2, 2)


def test_what_pillow_cannot_decode_is_a_bad_image():
    data = RIGHT["tiff lzma"][0]
    damaged = data[:200] + bytes(300) + data[500:]
    assert read_header(damaged).by_pillow
    with pytest.raises(BadImage, match="^corrupt or truncated TIFF"):
        decoded(damaged)
