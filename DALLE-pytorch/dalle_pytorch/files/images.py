"""Images on disk and in memory: Pillow on one side, tensors in [0, 1] on the other."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_image(path: str | os.PathLike) -> Image.Image:
    """Opens any picture as RGB; transparency is laid over white. Raises `FileError` if it is none."""
    try:
        with Image.open(path) as image:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileError(f"there is no picture {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path} is not a picture that can be read ({error})") from None


def image_to_tensor(image: Image.Image, size: int | None = None) -> Tensor:
    """A (1, 3, h, w) float tensor in [0, 1]; with `size`, the centre square of the picture at that side in pixels."""
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255


def tensor_to_image(image: Tensor) -> Image.Image:
    """A picture from a (3, h, w) tensor in [0, 1]; values outside are clipped."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image: Tensor, size: int) -> Tensor:
    """Scales (b, 3, h, w) pictures to `size` × `size` pixels, antialiased."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def save_image(path: str | os.PathLike, image: Tensor | Image.Image) -> None:
    """Writes a PNG, whole or not at all. `image` is a Pillow picture or a (3, h, w) tensor in [0, 1]."""
    buffer = io.BytesIO()
    (tensor_to_image(image) if isinstance(image, Tensor) else image).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def contact_sheet(images: Sequence[Tensor], columns: int | None = None, gap: int = 4) -> Image.Image:
    """One picture of many: (3, h, w) tensors in [0, 1] of equal size, row by row on white."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    height, width = images[0].shape[-2:]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(tensor_to_image(image), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
