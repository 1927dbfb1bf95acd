"""Images on disk and in memory: Pillow on one side, tensors in [0, 1] on the other."""

import io
import os
import struct
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.files.metadata import without_metadata

#: the formats that are read, by file suffix; none of their readers starts a program, as PostScript's does
FORMATS = {
    **dict.fromkeys((".png", ".apng"), "PNG"), **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    ".webp": "WEBP", ".avif": "AVIF", ".gif": "GIF", **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"), **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"), "JPEG2000"),
}  # fmt: skip
LARGEST_FILE = 2**30  # bytes
LARGEST_IMAGE = 64_000_000  # pixels, after a JPEG is decoded at a fraction of its size: 1.5 GiB in the worst format
DRAFT_SIDE = 4096  # what is left at least of the shorter side of a JPEG that is larger
LONGEST_SIDE = 65_535  # as in JPEG: memory grows with the number of rows too
LARGEST_JPEG = 2**35  # pixels × scans: each scan of a progressive one goes over all pixels

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def decode_image(
    source: str | os.PathLike | bytes, *, transparent: bool = False, min_side: int | None = None
) -> Image.Image:
    """An image file, or its bytes, as RGB over white, or with `transparent` as RGBA; of an animation its first frame.

    The format is recognised by content, out of `FORMATS`. EXIF orientation is applied; other metadata, damaged ones
    too, are ignored. A JPEG may be decoded at a half, quarter or eighth of its size that is still at least `min_side`.

    Raises `FileError`, whose message is only the reason, also for images that are too large, before they are decoded.
    """
    try:
        data = source if isinstance(source, bytes) else _read(source)
    except OSError as error:
        raise FileError(error.strerror or str(error)) from None
    try:
        return _decode(data, transparent, min_side)
    except FileError as error:
        try:
            bare = without_metadata(data)
        except struct.error:
            raise error from None
        if bare == data:
            raise
        return _decode(bare, transparent, min_side)


def _read(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise FileError(f"over {LARGEST_FILE >> 20} MiB")
    return data


def _decode(data: bytes, transparent: bool, min_side: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
                pixels = image.width * image.height
                if min_side is not None or pixels > LARGEST_IMAGE:
                    side = min_side or DRAFT_SIDE
                    image.draft(None, (side, side))
                if image.width * image.height > LARGEST_IMAGE or max(image.size) > LONGEST_SIDE:
                    raise FileError(f"{image.width}×{image.height} pixels, expected at most {LARGEST_IMAGE} and sides "
                                    f"of {LONGEST_SIDE}")  # fmt: skip
                if image.format in ("JPEG", "MPO") and pixels * data.count(b"\xff\xda") > LARGEST_JPEG:
                    raise FileError("too many scans for its size")
                return convert(image, transparent)
    except (FileError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = ", ".join(sorted(set(FORMATS.values())))
        raise FileError(f"unknown format, or a kind of pixels that is not read; expected one of {known}") from None
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise FileError(str(error) or type(error).__name__) from None


def convert(image: Image.Image, transparent: bool = False) -> Image.Image:
    """An image of any kind of pixels, turned as its EXIF says, as RGB over white, or with `transparent` as RGBA."""
    image.load()  # a TIFF is turned by this
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "LAB":
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                          outputMode="RGB") or image  # fmt: skip
    if not transparent and not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return image if transparent else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNED.get(image.getexif()[ExifTags.Base.Orientation])
    except Exception:  # metadata can be absent, and hold anything
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow's own conversion clips at 255, as 8 bits.

    White is 65535 for integers, 1 or 255 for floating-point numbers: the least of these that is no less than the
    largest pixel, or else that pixel.
    """
    pixels = np.array(image, np.float32)
    if image.mode == "F":
        np.nan_to_num(pixels, copy=False, posinf=0)
    largest = float(pixels.max())
    white = next((white for white in ((1, 255, 65535) if image.mode == "F" else (65535,)) if white >= largest), largest)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(pixels == key, 0, 255).astype(np.uint8))
    pixels = np.multiply(pixels, 255 / white, out=pixels).round(out=pixels).clip(0, 255, out=pixels)
    image = Image.fromarray(pixels.astype(np.uint8))
    return image if alpha is None else Image.merge("LA", (image, alpha))


def read_image(image: Image.Image | str | os.PathLike) -> Image.Image:
    """An image, or the one in a file, as RGB over white, see `decode_image`. Raises `FileError`."""
    if isinstance(image, Image.Image):
        return convert(image)
    try:
        return decode_image(image)
    except FileError as error:
        raise FileError(f"cannot read image {image}: {error}") from None


def image_to_tensor(image: Image.Image, size: int | None = None) -> Tensor:
    """A (1, 3, h, w) float tensor in [0, 1]; with `size`, the centre square scaled to that side in pixels."""
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255


def tensor_to_image(image: Tensor) -> Image.Image:
    """The image of a (3, h, w) tensor in [0, 1]; values outside are clipped."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image: Tensor, size: int) -> Tensor:
    """Scales (b, 3, h, w) images to `size` × `size` pixels, antialiased."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def save_image(path: str | os.PathLike, image: Tensor | Image.Image) -> None:
    """Writes a PNG atomically. `image` is a Pillow image or a (3, h, w) tensor in [0, 1]."""
    buffer = io.BytesIO()
    (tensor_to_image(image) if isinstance(image, Tensor) else image).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def contact_sheet(images: Sequence[Tensor], columns: int | None = None, gap: int = 4) -> Image.Image:
    """One image of many: (3, h, w) tensors in [0, 1] of equal size, row by row on white."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    height, width = images[0].shape[-2:]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(tensor_to_image(image), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
