"""The things as stickers: sprites of Noto Emoji (Apache 2.0) in their own colours, recoloured, or made of a texture."""

from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

from dalle_pytorch.scenes.things import THINGS

SPRITE = 128  # pixels a side
COLUMNS = 14  # sprites in a row of the sheet
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


@cache
def _sheet() -> Image.Image:
    with (files("dalle_pytorch.scenes") / "sprites.webp").open("rb") as file:
        return Image.open(file).convert("RGBA")


@lru_cache(maxsize=512)
def sprite(kind: str, cells: int, cell: int) -> np.ndarray:
    """(side, side, 4) float32, RGB in 0 … 255 and alpha in 0 … 1: a thing of `cells` grid cells a side, `cell` pixels
    each, with a margin of one cell all around."""
    row, column = divmod(list(THINGS).index(kind), COLUMNS)
    box = column * SPRITE, row * SPRITE, (column + 1) * SPRITE, (row + 1) * SPRITE
    picture = _sheet().crop(box).resize((cells * cell, cells * cell), Image.Resampling.LANCZOS)
    padded = np.pad(np.asarray(picture, np.float32), ((cell, cell), (cell, cell), (0, 0)))
    return padded / np.array((1, 1, 1, 255), np.float32)


def dilate(alpha: np.ndarray, radius: float) -> np.ndarray:
    """The coverage (h, w) of all that lies within `radius` pixels of what `alpha` (h, w) covers, with a soft edge."""
    reach = int(np.ceil(radius))
    wide, (height, width) = np.pad(alpha, reach), alpha.shape
    out = np.zeros_like(alpha)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weight = min(1.0, radius + 0.5 - (dx * dx + dy * dy) ** 0.5)
            if weight > 0:
                shifted = wide[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
                np.maximum(out, shifted * np.float32(weight), out=out)
    return out


@lru_cache(maxsize=512)
def _shading(kind: str, cells: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """How much darker and how much lighter than its median each pixel of a thing is, (side, side, 1) in 0 … 1."""
    picture = sprite(kind, cells, cell)
    luma = picture[..., :3] @ LUMA / 255
    low, middle, high = np.percentile(luma[picture[..., 3] > 0.5], (5, 50, 95))
    darker = np.clip((middle - luma) / max(middle - low, 0.15), 0, 1)
    lighter = np.clip((luma - middle) / max(high - middle, 0.15), 0, 1)
    return darker[..., None], lighter[..., None]


def recoloured(kind: str, cells: int, cell: int, colour: np.ndarray) -> np.ndarray:
    """(side, side, 3): a thing in another colour, one (3,) or a texture (side, side, 3), with its own shading."""
    darker, lighter = _shading(kind, cells, cell)
    strength = 0.6 if colour.ndim == 1 else 0.35  # a texture must remain one in the lights
    return colour * (1 - 0.72 * darker) + (255 - colour) * strength * lighter
