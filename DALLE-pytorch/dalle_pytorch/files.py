"""Pictures and token grids on disk: Pillow on one side, tensors in [0, 1] and int64 tokens on the other."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.checkpoints import write_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FileError(ValueError):
    """A picture or token file that cannot be used. The message is one line for the user."""


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


def save_tokens(path: str | os.PathLike, tokens: Tensor) -> None:
    """Writes a grid of image tokens as `.npy`: int64, row-major, shape (side²,)."""
    buffer = io.BytesIO()
    np.save(buffer, tokens.detach().cpu().reshape(-1).numpy().astype(np.int64), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def load_tokens(path: str | os.PathLike, num_tokens: int, seq_len: int | None = None) -> Tensor:
    """Reads a token file as (side²,) int64, checked against the codebook. Raises `FileError`, never unpickles.

    `num_tokens` is the size of the codebook, `seq_len` the number of tokens wanted (any square number when None).
    A grid of shape (side, side) or (1, side²), as other tools write them, is flattened.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileError(f"there is no token file {path}") from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = "it holds pickled objects" if "pickle" in str(error).lower() else str(error).splitlines()[0]
        raise FileError(f"{path} is not a usable token file: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise FileError(f"{path} is an archive of arrays; a single array of tokens is wanted")
    if not np.issubdtype(array.dtype, np.integer):
        raise FileError(f"{path} holds {array.dtype} values; tokens are integers (int64)")
    side = int(array.size**0.5)
    flat = array.shape in {(array.size,), (1, array.size), (side, side), (1, side, side)}
    if side < 1 or side * side != array.size or not flat:
        raise FileError(f"{path} has shape {array.shape}; tokens of a square grid, ({seq_len or 'side²'},), are wanted")
    if seq_len is not None and array.size != seq_len:
        raise FileError(f"{path} holds {array.size} tokens; this model draws grids of {seq_len}")
    if array.min() < 0 or array.max() >= num_tokens:
        raise FileError(
            f"{path} holds token {array.max() if array.max() >= num_tokens else array.min()}; "
            f"this codebook has the tokens 0 to {num_tokens - 1}"
        )
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


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


def safe_name(prompt: str, longest: int = 80) -> str:
    """A file name that says what the prompt says: letters, digits and `-`, the rest `_`; never empty, never `..`."""
    name = re.sub(r"[^\w-]+", "_", prompt, flags=re.UNICODE).strip("_")
    # File systems count bytes, not characters.
    while len(name.encode("utf-8")) > longest:
        name = name[:-1]
    return name.rstrip("_") or "prompt"
