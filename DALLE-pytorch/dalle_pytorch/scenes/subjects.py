"""What the subjects look like: signed distances in a box of [-1, 1]², negative inside, and the layers of a sticker."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from dalle_pytorch.scenes.backgrounds import SUPERSAMPLE, shrink
from dalle_pytorch.scenes.sprites import dilate, sprite
from dalle_pytorch.scenes.things import THINGS
from dalle_pytorch.scenes.world import RIM


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float,
         points: int = 24) -> list[tuple[float, float]]:  # fmt: skip
    """Points of an ellipse from `start` to `end` degrees; 0 is right, 90 is down."""
    angles = np.radians(np.linspace(start, end, points))
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in angles]


STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "zero": [_arc(0, 0, 0.46, 0.7, 0, 360, 48)],
    "one": [[(-0.32, -0.4), (0.04, -0.7), (0.04, 0.7)], [(-0.36, 0.7), (0.44, 0.7)]],
    "two": [[*_arc(0, -0.3, 0.46, 0.4, -170, 30), (-0.48, 0.7), (0.5, 0.7)]],
    "three": [[*_arc(-0.04, -0.35, 0.44, 0.35, -150, 90), *_arc(-0.04, 0.35, 0.5, 0.35, -90, 150)]],
    "four": [[(0.22, 0.7), (0.22, -0.7), (-0.54, 0.28), (0.56, 0.28)]],
    "five": [[(0.46, -0.7), (-0.38, -0.7), (-0.42, -0.12), *_arc(-0.02, 0.24, 0.48, 0.46, -125, 140)]],
    "six": [[(0.28, -0.72), *_arc(0.1, 0.24, 0.58, 0.9, -110, -180, 12)], _arc(0, 0.28, 0.46, 0.42, 0, 360, 40)],
    "seven": [[(-0.5, -0.7), (0.5, -0.7), (-0.12, 0.7)]],
    "eight": [_arc(0, -0.36, 0.36, 0.34, 0, 360, 40), _arc(0, 0.35, 0.46, 0.36, 0, 360, 40)],
    "nine": [[(-0.28, 0.72), *_arc(-0.1, -0.24, 0.58, 0.9, 70, 0, 12)], _arc(0, -0.28, 0.46, 0.42, 0, 360, 40)],
    "letter a": [[(-0.54, 0.7), (0, -0.72), (0.54, 0.7)], [(-0.34, 0.24), (0.34, 0.24)]],
    "letter c": [_arc(0.06, 0, 0.56, 0.7, 45, 315, 36)],
    "letter e": [[(0.44, -0.7), (-0.42, -0.7), (-0.42, 0.7), (0.46, 0.7)], [(-0.42, 0), (0.3, 0)]],
    "letter f": [[(0.48, -0.7), (-0.36, -0.7), (-0.36, 0.72)], [(-0.36, -0.04), (0.3, -0.04)]],
    "letter h": [[(-0.48, -0.7), (-0.48, 0.7)], [(0.48, -0.7), (0.48, 0.7)], [(-0.48, 0), (0.48, 0)]],
    "letter k": [[(-0.42, -0.7), (-0.42, 0.7)], [(0.5, -0.7), (-0.4, 0.1)], [(-0.08, -0.16), (0.52, 0.7)]],
    "letter m": [[(-0.62, 0.7), (-0.56, -0.68), (0, 0.3), (0.56, -0.68), (0.62, 0.7)]],
    "letter p": [
        [(-0.36, 0.72), (-0.36, -0.7), (0.1, -0.7), *_arc(0.1, -0.28, 0.42, 0.42, -90, 90, 16), (-0.36, 0.14)]
    ],
    "letter t": [[(-0.56, -0.7), (0.56, -0.7)], [(0, -0.7), (0, 0.72)]],
    "letter u": [[(-0.48, -0.7), *_arc(0, 0.2, 0.48, 0.5, 180, 0, 24), (0.48, -0.7)]],
    "letter x": [[(-0.5, -0.7), (0.5, 0.7)], [(0.5, -0.7), (-0.5, 0.7)]],
    "letter y": [[(-0.52, -0.7), (0, 0)], [(0.52, -0.7), (0, 0), (0, 0.72)]],
}
STROKE_RADIUS = 0.2


def _star() -> list[tuple[float, float]]:
    radii = [0.95, 0.42] * 5
    return [(r * np.sin(np.pi * i / 5), 0.05 - r * np.cos(np.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(x / 18.5, -(y + 2.5) / 17.0, strict=True))


def _flower() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    radius = 0.64 + 0.26 * np.cos(5 * t)
    return [(r * np.sin(a), -r * np.cos(a)) for r, a in zip(radius, t, strict=True)]


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "star": _star(),
    "heart": _heart(),
    "circle": _arc(0, 0, 0.8, 0.8, 0, 355, 72),
    "square": [(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)],
    "triangle": [(0, -0.82), (0.9, 0.72), (-0.9, 0.72)],
    "diamond": [(0, -0.92), (0.62, 0), (0, 0.92), (-0.62, 0)],
    "cross": [(-0.28, -0.85), (0.28, -0.85), (0.28, -0.28), (0.85, -0.28), (0.85, 0.28), (0.28, 0.28),
              (0.28, 0.85), (-0.28, 0.85), (-0.28, 0.28), (-0.85, 0.28), (-0.85, -0.28), (-0.28, -0.28)],
    "moon": [*_arc(0.05, 0, 0.85, 0.85, 48, 312, 48), *_arc(0.42, 0, 0.66, 0.68, 290, 70, 36)],
    "arrow": [(-0.86, -0.26), (0.06, -0.26), (0.06, -0.72), (0.9, 0), (0.06, 0.72), (0.06, 0.26), (-0.86, 0.26)],
    "house": [(0, -0.88), (0.9, -0.08), (0.62, -0.08), (0.62, 0.8), (0.2, 0.8), (0.2, 0.26), (-0.2, 0.26),
              (-0.2, 0.8), (-0.62, 0.8), (-0.62, -0.08), (-0.9, -0.08)],
    "cloud": [(-0.62, 0.52), *_arc(-0.56, 0.14, 0.36, 0.38, 90, 250, 16), *_arc(-0.1, -0.18, 0.46, 0.44, 200, 320, 16),
              *_arc(0.5, 0.12, 0.42, 0.4, 270, 450, 16)],
    "drop": [(0, -0.92), *_arc(0, 0.26, 0.62, 0.62, -35, 215, 48)],
    "bolt": [(0.28, -0.92), (-0.58, 0.16), (-0.06, 0.16), (-0.26, 0.92), (0.6, -0.26), (0.08, -0.26)],
    "flower": _flower(),
    "tree": [(0, -0.92), (0.5, -0.3), (0.26, -0.3), (0.74, 0.36), (0.18, 0.36), (0.18, 0.9), (-0.18, 0.9),
             (-0.18, 0.36), (-0.74, 0.36), (-0.26, -0.3), (-0.5, -0.3)],
    "crown": [(-0.86, -0.5), (-0.42, -0.02), (0, -0.78), (0.42, -0.02), (0.86, -0.5), (0.7, 0.7), (-0.7, 0.7)],
    "fish": [*_arc(0.14, 0, 0.74, 0.5, -150, 150, 40), (-0.9, 0.5), (-0.74, 0), (-0.9, -0.5)],
}  # fmt: skip


def _segment_distance(x: np.ndarray, y: np.ndarray, a: tuple[float, float], b: tuple[float, float]) -> np.ndarray:
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    return np.hypot(x - a[0] - t * dx, y - a[1] - t * dy)


def _signed_distance(kind: str, side: int, reach: float) -> np.ndarray:
    """(side, side) distances to the outline of a subject over [-reach, reach]², in units of half its box."""
    axis = (((np.arange(side) + 0.5) / side * 2 - 1) * reach).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = np.full_like(x, np.inf)
    if kind in STROKES:
        for stroke in STROKES[kind]:
            for a, b in pairwise(stroke):
                distance = np.minimum(distance, _segment_distance(x, y, a, b))
        return distance - STROKE_RADIUS
    points = POLYGONS[kind]
    inside = np.zeros(x.shape, bool)
    for a, b in zip(points, points[1:] + points[:1], strict=True):
        distance = np.minimum(distance, _segment_distance(x, y, a, b))
        if a[1] != b[1]:
            crossing = (a[1] > y) != (b[1] > y)
            inside ^= crossing & (x < (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) + a[0])
    return np.where(inside, -distance, distance) - 0.03


@dataclass(frozen=True)
class SubjectLayers:
    """How much of each pixel a part of a subject covers, and the light on its fill, each (side, side) in [0, 1].

    `side` is that of the subject's box with a margin of one cell all around.
    """

    shadow: np.ndarray
    rim: np.ndarray
    outline: np.ndarray
    fill: np.ndarray
    light: np.ndarray


@lru_cache(maxsize=512)
def subject_layers(kind: str, cells: int, cell: int) -> SubjectLayers:
    """The layers of a subject of `cells` grid cells a side, `cell` pixels each."""
    return _thing_layers(kind, cells, cell) if kind in THINGS else _glyph_layers(kind, cells, cell)


def _thing_layers(kind: str, cells: int, cell: int) -> SubjectLayers:
    fill = sprite(kind, cells, cell)[..., 3]
    rim, shift = dilate(fill, RIM * cell), max(1, round(0.12 * cell))
    shadow = np.pad(rim, ((shift, 0), (shift, 0)))[: len(rim), : len(rim)]
    return SubjectLayers(shadow, rim, outline=np.zeros_like(fill), fill=fill, light=np.ones_like(fill))


def _glyph_layers(kind: str, cells: int, cell: int) -> SubjectLayers:
    fine = (cells + 2) * cell * SUPERSAMPLE
    distance = _signed_distance(kind, fine, reach=1 + 2 / cells)
    unit = 2 / cells  # a grid cell, in units of half the box
    edge = unit / (cell * SUPERSAMPLE)  # a fine pixel

    def coverage(d: np.ndarray, softness: float = 1.25 * edge) -> np.ndarray:
        return np.clip(0.5 - d / (2 * softness), 0, 1)

    sticker = distance - RIM * unit
    shift = max(1, round(0.12 * cell * SUPERSAMPLE))
    shadow = np.zeros_like(distance)
    shadow[shift:, shift:] = coverage(sticker[:-shift, :-shift], softness=0.08 * unit)
    light = np.linspace(1.12, 0.86, fine, dtype=np.float32)[:, None] * np.ones_like(distance)
    # A bevel: the upper left rim is lit, the lower right one lies in shade.
    slope = np.gradient(distance)
    bevel = np.exp(-((distance + 0.1) ** 2) / 0.004)
    light += -0.12 * bevel * np.sign(slope[0] + slope[1])
    layers = (shadow, coverage(sticker), coverage(distance - 0.06), coverage(distance), light)
    return SubjectLayers(*(shrink(layer.astype(np.float32)) for layer in layers))
