"""Images on disk and in memory: Pillow on one side, tensors in [0, 1] on the other."""

import functools
import io
import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_bytes


@functools.cache
def image_formats() -> dict[str, str]:
    """Pillow's formats by file suffix, `.png` to `PNG`, without PostScript, which Pillow reads by Ghostscript."""
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in ("EPS", "PDF")
    }


def decode_image(
    source: str | os.PathLike | bytes, *, transparent: bool = False, min_side: int | None = None
) -> Image.Image:
    """An image file, or its bytes, as RGB over white, or with `transparent` as RGBA.

    The format is recognised by content, from a closed list. EXIF orientation is applied. A JPEG may be decoded at a
    half, quarter or eighth of its size that is still at least `min_side`.

    Raises `FileError`, whose message is only the reason, also for images so large that Pillow suspects a
    decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=sorted(set(image_formats().values()))) as image:
                if min_side is not None:
                    image.draft(None, (min_side, min_side))
                ImageOps.exif_transpose(image, in_place=True)
                return _convert(image, transparent)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        raise FileError(
            "unknown format" if isinstance(error, UnidentifiedImageError) else str(reason or error)
        ) from None


def _convert(image: Image.Image, transparent: bool) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow's own conversion clips at 255.
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent and not has_alpha:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image if transparent else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image in a file as RGB over white, see `decode_image`. Raises `FileError`."""
    try:
        return decode_image(path)
    except FileError as error:
        raise FileError(f"cannot read image {path}: {error}") from None


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
