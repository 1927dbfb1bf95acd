"""Image files without their metadata, which may be damaged, too large or of kinds that a decoder refuses."""

import struct
import zlib
from collections.abc import Iterator

_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_JPEG_SEGMENTS = frozenset(range(0xE1, 0xFF)) - {0xEE}  # APP1 to APP15 and comments, not Adobe's, which is of colours
_TIFF_TAGS = {*range(254, 267), 273, 274, *range(277, 282), 284, 317, *range(320, 326), 338, 339, 347, *range(512, 533)}


def without_metadata(data: bytes) -> bytes:
    """The same image in a PNG, JPEG, TIFF or AVIF file with little else than pixels and orientation; other data as is.

    Animated PNGs become their first frame. Raises `struct.error` for a file that ends too early.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(_png_chunks(data))
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"".join(_jpeg_segments(data))
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data)
    if data[4:12] == b"ftypavif":
        return data.replace(b"Exif", b"free")  # the type of an item
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    start = 8
    while start < len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + size
        whole = name != b"eXIf" or data[end - 4 : end] == zlib.crc32(data[start + 4 : end - 4]).to_bytes(4, "big")
        if name in _PNG_CHUNKS and whole:
            yield data[start:end]
        start = end


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    start, marker = 2, 0
    while marker != 0xDA:  # where the pixels begin
        marker, size = struct.unpack_from(">xBH", data, start)
        end = start + 2 + size
        if marker not in _JPEG_SEGMENTS or data[start + 4 : end].startswith(b"Exif\0\0"):
            yield data[start:end]
        start = end
    yield data[start:]


def _tiff(data: bytes) -> bytes:
    """Shortens the list of tags in its place."""
    order = "<" if data.startswith(b"I") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_TAGS]
    tags = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + tags + data[start + len(tags) :]
