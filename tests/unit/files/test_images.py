"""Images as people have them: every kind of pixels, any metadata, nothing too large, and no program started."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle_pytorch.errors import FileError
from dalle_pytorch.files import images
from dalle_pytorch.files.images import decode_image, read_image

COLOUR = (10, 120, 200)
GREY16 = np.full((4, 4), 100 * 257, np.uint16)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png, name, data, crc=True):
    new = chunk(name, data)
    return png[:33] + (new if crc else new[:-1] + b"?") + png[33:]  # after the header


def png16(kind, values):
    """2×2 pixels of 16-bit samples."""
    row = b"\0" + 2 * struct.pack(f">{len(values)}H", *values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(2 * row)) + chunk(b"IEND", b"")


def segment(jpeg, marker, data):
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]


def tags(*entries):
    """EXIF data, or the head of a TIFF file, with these tags: (tag, type, count, value)."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


def slope():
    return Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)


P = Image.new("RGB", (4, 4), COLOUR).quantize(4)
FLOATS = np.array([[0, 0.5], [1, np.nan]], np.float32)


@pytest.mark.parametrize("data, pixel", [
    (encode(Image.fromarray(GREY16), "PNG"), (100, 100, 100)),
    (encode(Image.fromarray(GREY16.astype(">u2")), "TIFF"), (100, 100, 100)),
    (encode(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), (100, 100, 100)),
    (encode(Image.fromarray(GREY16), "JPEG2000"), (100, 100, 100)),
    (encode(Image.fromarray(GREY16), "PNG", transparency=25700), (255, 255, 255)),
    (encode(Image.fromarray(GREY16), "PNG", transparency=25600), (100, 100, 100)),
    (png16(2, [10 * 257, 120 * 257, 200 * 257]), COLOUR), (png16(6, [0, 0, 0, 0]), (255, 255, 255)),
    (png16(4, [0, 0x8000]), (127, 127, 127)),
    (b"P5 1 1 1023\n" + struct.pack(">H", 512), (128, 128, 128)),
    (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.25), (64, 64, 64)),
    (encode(Image.fromarray(FLOATS[::-1, ::-1]), "TIFF"), (0, 0, 0)),
    (encode(Image.fromarray(FLOATS[:, 1:]), "TIFF"), (128, 128, 128)),
    (encode(Image.fromarray(FLOATS[:, 1:] * 200), "TIFF"), (100, 100, 100)),
    (encode(Image.new("RGB", (4, 4), COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    (encode(Image.new("RGB", (4, 4), COLOUR).convert("CMYK"), "JPEG", quality=100), COLOUR),
    (encode(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF"), (119, 119, 119)),
    (encode(P, "PNG"), COLOUR), (encode(P, "PNG", transparency=P.getpixel((0, 0))), (255, 255, 255)),
    (encode(P, "PNG", transparency=bytes([128] * 4)), (132, 187, 227)),
    (encode(P, "GIF", transparency=P.getpixel((0, 0))), (255, 255, 255)),
    (encode(Image.new("1", (4, 4)), "PNG", transparency=0), (255, 255, 255)),
    (encode(Image.new("L", (4, 4), 7), "PNG", transparency=7), (255, 255, 255)),
    (encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "WEBP", lossless=True), (127, 127, 127)),
])  # fmt: skip
def test_kinds_of_pixels(data, pixel):
    image = decode_image(data)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == pixel


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "GIF"])
def test_animations_and_pages_are_their_first_image(kind):
    data = encode(Image.new("RGB", (8, 8), COLOUR), kind, save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert np.abs(np.subtract(decode_image(data).getpixel((0, 0)), COLOUR)).max() <= 5


@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 100}), ("PNG", {}), ("TIFF", {}),
                                           ("WEBP", {"lossless": True}), ("AVIF", {"quality": 100})])  # fmt: skip
@pytest.mark.parametrize("orientation, rows", [
    (1, [[0, 40, 80], [120, 160, 200]]), (2, [[80, 40, 0], [200, 160, 120]]), (3, [[200, 160, 120], [80, 40, 0]]),
    (4, [[120, 160, 200], [0, 40, 80]]), (5, [[0, 120], [40, 160], [80, 200]]), (6, [[120, 0], [160, 40], [200, 80]]),
    (7, [[200, 80], [160, 40], [120, 0]]), (8, [[80, 200], [40, 160], [0, 120]]),
])  # fmt: skip
def test_orientation(kind, options, orientation, rows):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(slope(), kind, exif=exif, **options)
    # Pillow images of the caller's are treated as files are.
    for image in (decode_image(data), read_image(Image.open(io.BytesIO(data)))):
        assert np.abs(np.asarray(image, int)[..., 0] - rows).max() <= 9


def damaged_metadata():
    png, jpeg = encode(slope(), "PNG"), encode(slope(), "JPEG", quality=100)
    large = np.random.default_rng(0).bytes(2_000_000)
    for name, data in ((b"iCCP", b"icc\0\0" + zlib.compress(large, 1)), (b"iCCP", b"icc"), (b"tEXt", b"a\0" + large),
                       (b"zTXt", b"a\0\0" + zlib.compress(bytes(9_000_000))), (b"iTXt", b"a\0\1\0\0\0" + large[:99]),
                       (b"pHYs", b""), (b"cHRM", b"abc"), (b"eXIf", b"junk"), (b"acTL", b"\0" * 8)):  # fmt: skip
        yield f"{name} {len(data)}", with_chunk(png, name, data)
        yield f"{name} {len(data)} crc", with_chunk(png, name, data, crc=False)
    exif = b"Exif\0\0"
    for name, data in (("no data", exif), ("junk", exif + b"junk"), ("cut", exif + tags((0x8769, 4, 1, 2**31))[:-5]),
                       ("pointer", exif + tags((0x8769, 4, 1, 2**31))), ("text", exif + tags((0x112, 2, 1, 54))),
                       ("pair", exif + tags((0x112, 5, 1, 8))), ("many", exif + tags((0x112, 3, 2**31, 6))),
                       ("dpi", exif + tags((0x11A, 2, 1, 0))), ("0", exif + tags((0x112, 3, 1, 0)))):  # fmt: skip
        yield f"EXIF {name}", segment(jpeg, 0xE1, data)
    pages = b"MPF\0" + tags((0xB000, 7, 4, 0), (0xB001, 2, 1, 2))
    for marker, data in ((0xE2, pages), (0xE2, b"MPF\0II*\0"), (0xE2, b"ICC_PROFILE\0"), (0xFE, b""), (0xE1, b"")):
        yield f"segment {marker:x} {len(data)}", segment(jpeg, marker, data)
    tiff = encode(slope(), "TIFF")
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    entries = [tiff[start + 2 + 12 * i :][:12] for i in range(count)]
    for tag, kind in ((0x10E, 12), (0x11A, 2), (0x8769, 4), (0x8773, 7), (0x83BB, 2), (0x112, 12)):
        entry = struct.pack("<HHII", tag, kind, 2**20, 2**31)
        more = b"".join(sorted([*entries, entry], key=lambda e: struct.unpack_from("<H", e)))
        yield f"TIFF {tag:x}", tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + struct.pack("<H", count + 1) + more
    exif = Image.Exif()
    exif[0x10F] = "a maker"
    avif = encode(slope(), "AVIF", quality=100, exif=exif)
    assert b"Exif" in avif and b"MM\0*" in avif
    yield "AVIF", avif.replace(b"MM\0*", b"junk").replace(b"II*\0", b"junk")


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damaged_metadata()])
def test_metadata_that_cannot_be_read_is_ignored(data):
    assert np.abs(np.asarray(decode_image(data), int)[..., 0] - np.asarray(slope(), int)).max() <= 9


def test_orientation_survives_other_metadata_that_is_damaged():
    exif = Image.Exif()
    exif[0x0112] = 6
    png = with_chunk(encode(slope(), "PNG", exif=exif), b"iCCP", b"icc")
    jpeg = segment(encode(slope(), "JPEG", exif=exif), 0xE2, b"MPF\0" + tags((0xB001, 2, 1, 2)))
    assert decode_image(png).size == decode_image(jpeg).size == (2, 3)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "PCX", "SGI", "ICO"])
def test_formats_that_are_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    (tmp_path / "photo.png").write_bytes(encode(Image.new("RGB", (16, 16)), kind))
    with pytest.raises(FileError, match=r"^cannot read image .*photo\.png: unknown format[^\n]*PNG, PPM, TIFF"):
        read_image(tmp_path / "photo.png")


def test_size_is_bounded_before_pixels_are_decoded(monkeypatch):
    def png(width, height):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for width, height in ((10_000, 10_000), (1, 70_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(FileError):
            decode_image(png(width, height))
    jpeg = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    monkeypatch.setattr(images, "LARGEST_JPEG", 64 * 64 * 20)
    with pytest.raises(FileError, match="too many scans"):
        decode_image(jpeg[:-2] + 20 * scan + jpeg[-2:])
    monkeypatch.setattr(images, "LARGEST_FILE", 100)
    with pytest.raises(FileError, match="over 0 MiB"):
        read_image("/dev/zero")


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch):
    data = encode(Image.new("RGB", (640, 480), COLOUR), "JPEG", quality=95)
    monkeypatch.setattr(images, "LARGEST_IMAGE", 100_000)
    with pytest.raises(FileError):
        decode_image(data)
    monkeypatch.setattr(images, "DRAFT_SIDE", 200)
    assert decode_image(data).size == (320, 240)
