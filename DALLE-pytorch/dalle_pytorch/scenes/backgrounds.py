"""Textures, and the fine grain below them. A texture is a colour for every place in grid cells, (h, w) each, and every
variant."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from dalle_pytorch.scenes.world import GRID

GRAIN = 256  # cells a side of the lattice that carries the fine grain
SUPERSAMPLE = 2


def shrink(picture: np.ndarray) -> np.ndarray:
    """Averages SUPERSAMPLE × SUPERSAMPLE blocks."""
    height, width = (side // SUPERSAMPLE for side in picture.shape[:2])
    return picture.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, *picture.shape[2:]).mean((1, 3))


def _hash01(*integers: np.ndarray | int) -> np.ndarray:
    """A fixed pseudo-random number in [0, 1) for every tuple of integers."""
    state: np.ndarray = np.array(2166136261, np.uint32)
    for value in integers:
        state = (state ^ np.asarray(value).astype(np.int64).astype(np.uint32)) * np.uint32(16777619)
        state ^= state >> np.uint32(15)
    return (state * np.uint32(2654435769) >> np.uint32(8)).astype(np.float32) / np.float32(2**24)


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], t: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float32) + (np.asarray(b, np.float32) - np.asarray(a, np.float32)) * t[..., None]


def _plain(colour: tuple[int, int, int], x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    return _mix(colour, colour, x)


def _brick(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    row = np.floor(y / 2)
    along = x + 2 * ((row + variant) % 2)
    column = np.floor(along / 4)
    mortar = ((along % 4) < 0.4) | ((y % 2) < 0.4)
    tone = np.floor(_hash01(row, column, variant // 2) * 3) / 2
    colour = _mix((140, 72, 58), (172, 98, 78), tone)
    colour *= (1.06 - 0.05 * (y % 2))[..., None]
    return np.where(mortar[..., None], np.array((198, 190, 180), np.float32), colour)


def _wood(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    plank = np.floor(y / 4)
    along = x + 4 * ((plank * (1 + variant % 2) + variant) % 4)
    board = np.floor(along / 16)
    seam = ((y % 4) < 0.22) | ((along % 16) < 0.22)
    tone = ((plank + board + variant // 2) % 2) * 0.6
    bands = 0.5 + 0.5 * np.sin(2 * np.pi * (y % 4 + 0.25 * np.sin(2 * np.pi * along / 8)) / 1.0)
    colour = _mix((186, 138, 88), (150, 104, 62), np.clip(tone + 0.35 * bands, 0, 1))
    return np.where(seam[..., None], np.array((92, 60, 36), np.float32), colour)


def _water(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    wave = y + 2 * (variant // 2) + 0.6 * np.sin(2 * np.pi * (x + 2 * variant) / 8)
    height = 0.5 + 0.5 * np.cos(2 * np.pi * wave / 4)
    return _mix((70, 128, 168), (176, 214, 228), height**3)


def _lego(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    u, v = (x + variant % 2) % 2 - 1, (y + variant // 2) % 2 - 1
    radius = np.hypot(u, v)
    stud = np.clip((0.62 - radius) / 0.08 + 0.5, 0, 1)
    shade = np.clip((0.66 - np.hypot(u - 0.12, v - 0.14)) / 0.16 + 0.5, 0, 1) * (1 - stud)
    light = 1 - 0.28 * shade + stud * (0.08 - 0.1 * (u + v))
    return np.array((168, 172, 176), np.float32) * light[..., None]


def _checks(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    odd = (np.floor(x / 2 + variant % 2) + np.floor((y + variant // 2) / 2)) % 2
    return _mix((226, 220, 206), (128, 138, 150), odd)


def _stripes(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    return _mix((240, 228, 204), (120, 108, 104), np.floor((x + variant) / 2) % 2)


def _dots(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    u, v = x + 2 * (variant % 2), y + 2 * (variant // 2)
    # Two lattices of 4 cells, one set off by half: a dot in the middle of every other square of 2 cells.
    radius = np.minimum(*(np.hypot((u + k) % 4 - 1, (v + k) % 4 - 1) for k in (0, 2)))
    return _mix((250, 222, 120), (38, 128, 134), np.clip((0.72 - radius) / 0.1 + 0.5, 0, 1))


def _tiles(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    u, v = (x + 2 * (variant % 2)) % 4 - 2, (y + 2 * (variant // 2)) % 4 - 2
    grout = (np.maximum(np.abs(u), np.abs(v)) > 1.86)[..., None]
    colour = _mix((238, 240, 240), (52, 104, 168), (np.abs(u) + np.abs(v) < 1.2).astype(np.float32))
    return np.where(grout, np.array((170, 176, 180), np.float32), colour)


def _grass(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    row = np.floor((y + variant // 2) / 2)
    tip = np.abs((x + row + 0.5 * (variant % 2)) % 1 - 0.5)  # blades a cell wide, in rows of 2 cells
    height = ((y + variant // 2) % 2) / 2
    return _mix((46, 98, 40), (126, 178, 74), np.clip((height - tip) / 0.5 + 0.35, 0, 1))


def _sand(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    wave = y + variant % 2 + 0.5 * np.sin(2 * np.pi * (x + 4 * (variant // 2)) / 8)
    return _mix((214, 180, 126), (240, 216, 168), 0.5 + 0.5 * np.cos(np.pi * wave))


def _marble(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    along = x + y * (1 if variant % 2 else -1) + 4 * (variant // 2) + 0.8 * np.sin(2 * np.pi * y / 8)
    vein = np.abs((along % 8) - 4)
    return _mix((234, 234, 238), (132, 138, 152), np.exp(-((vein / 0.32) ** 2)) * 0.9)


def _plaid(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    down, across = ((x + variant % 2) % 4 < 2), ((y + variant // 2) % 4 < 2)
    colour = _mix((176, 40, 48), (60, 26, 46), (down.astype(np.float32) + across) / 2)
    thread = ((x + variant % 2) % 4 > 2.87) & ((x + variant % 2) % 4 < 3.13)
    thread |= ((y + variant // 2) % 4 > 2.87) & ((y + variant // 2) % 4 < 3.13)
    return np.where(thread[..., None], np.array((236, 206, 120), np.float32), colour)


def _zigzags(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    ridge = np.abs((x + 2 * (variant % 2)) % 4 - 2)
    return _mix((244, 236, 226), (226, 120, 88), np.floor((y + ridge + 2 * (variant // 2)) / 2) % 2)


def _night(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    column, row = np.floor(x / 2), np.floor(y / 2)
    shines = _hash01(column, row, variant, 7) < 0.3
    size = 0.16 + 0.18 * (_hash01(column, row, variant, 8) < 0.4)
    radius = np.hypot(x % 2 - 0.5, y % 2 - 0.5)  # in the middle of a cell
    light = np.clip((size - radius) / 0.1 + 0.5, 0, 1) * shines
    return _mix((24, 30, 74), (252, 246, 210), light)


Texture = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# Each with the strength of its grain in grey levels, and how far that is smeared along x and y, in lattice cells.
TEXTURES: dict[str, tuple[Texture, int, int, int]] = {
    "white": (partial(_plain, (244, 243, 240)), 7, 1, 1), "black": (partial(_plain, (30, 30, 34)), 10, 1, 1),
    "brick": (_brick, 26, 1, 1), "wood": (_wood, 34, 24, 1), "water": (_water, 24, 8, 1), "lego": (_lego, 7, 1, 1),
    "checks": (_checks, 18, 1, 8), "stripes": (_stripes, 18, 8, 1), "dots": (_dots, 14, 1, 1),
    "tiles": (_tiles, 10, 1, 1), "grass": (_grass, 26, 1, 6), "sand": (_sand, 28, 1, 1), "marble": (_marble, 14, 6, 1),
    "plaid": (_plaid, 24, 4, 1), "zigzags": (_zigzags, 16, 1, 4), "night": (_night, 12, 1, 1),
}  # fmt: skip


@lru_cache(maxsize=128)
def background_picture(name: str, variant: int, resolution: int) -> np.ndarray:
    side = resolution * SUPERSAMPLE
    axis = ((np.arange(side) + 0.5) / side * GRID).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return shrink(TEXTURES[name][0](x, y, variant).astype(np.float32))


def grain(name: str, seed: int, resolution: int) -> np.ndarray:
    """(resolution, resolution, 1) grey levels to add: white noise on the lattice, smeared the way the material runs.

    Blocks of 2 × 2 lattice cells sum to zero, so at half the lattice's resolution or below there is nothing left of it.
    """
    _, strength, along_x, along_y = TEXTURES[name]
    noise = np.random.default_rng(seed).standard_normal((GRAIN, GRAIN)).astype(np.float32)
    for axis, length in ((1, along_x), (0, along_y)):
        if length > 1:
            # A running mean by differences of cumulative sums, scaled to keep the variance.
            total = np.cumsum(np.concatenate([noise, np.take(noise, range(length), axis)], axis), axis)
            head = np.take(total, range(length, GRAIN + length), axis)
            noise = (head - np.take(total, range(GRAIN), axis)) / np.float32(length**0.5)
    blocks = noise.reshape(GRAIN // 2, 2, GRAIN // 2, 2)
    noise = (blocks - blocks.mean((1, 3), keepdims=True)).reshape(GRAIN, GRAIN) * np.float32(strength)
    if resolution != GRAIN:
        resample = Image.Resampling.BOX if resolution < GRAIN else Image.Resampling.BILINEAR
        noise = np.asarray(Image.fromarray(noise).resize((resolution, resolution), resample))
    return noise[..., None]
