"""Scenes drawn, at any resolution that is a multiple of 16 pixels."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dalle_pytorch.errors import UsageError
from dalle_pytorch.scenes.backgrounds import GRAIN, background_picture, grain
from dalle_pytorch.scenes.scenes import make_scene
from dalle_pytorch.scenes.sprites import recoloured, sprite
from dalle_pytorch.scenes.subjects import subject_layers
from dalle_pytorch.scenes.things import THINGS
from dalle_pytorch.scenes.world import COLOURS, GRID, MATERIALS, NATURAL, Scene, Subject

RIM_COLOUR = (252, 252, 250)


def check_resolution(resolution: int) -> None:
    """Raises `UsageError` for what scenes cannot be drawn at."""
    if resolution % GRID:
        raise UsageError(f"scenes are drawn at multiples of {GRID} pixels, got {resolution}")


def draw(scene: Scene, resolution: int = 256) -> np.ndarray:
    """The picture of a scene: (resolution, resolution, 3) uint8. `resolution` is a multiple of 16 pixels."""
    check_resolution(resolution)
    cell = resolution // GRID
    picture = background_picture(scene.background, scene.variant, resolution).copy()
    if resolution > GRAIN // 2:
        picture += grain(scene.background, scene.grain_seed, resolution)
    for subject in scene.subjects:
        layers = subject_layers(subject.kind, subject.cells, cell)
        colour = _colour(subject, resolution)
        paint = _paint(subject, colour, layers.light, cell)
        box = _box_with_margin(picture, subject, cell)
        box *= 1 - 0.45 * layers.shadow[..., None]
        box += (np.asarray(RIM_COLOUR, np.float32) - box) * layers.rim[..., None]
        box += (colour * 0.28 - box) * layers.outline[..., None]
        box += (paint - box) * layers.fill[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _colour(subject: Subject, resolution: int) -> np.ndarray:
    """A subject's colour (3,), or that of its material at every place, (side, side, 3), the same wherever it stands."""
    if subject.colour in MATERIALS:
        side = (subject.cells + 2) * resolution // GRID
        return background_picture(subject.colour, 0, resolution)[:side, :side]
    return np.asarray(COLOURS.get(subject.colour, RIM_COLOUR), np.float32)


def _paint(subject: Subject, colour: np.ndarray, light: np.ndarray, cell: int) -> np.ndarray:
    """What a subject is filled with, (side, side, 3)."""
    if subject.colour == NATURAL:
        return sprite(subject.kind, subject.cells, cell)[..., :3]
    if subject.kind in THINGS:
        return recoloured(subject.kind, subject.cells, cell, colour)
    return colour * light[..., None]


def subject_mask(scene: Scene) -> np.ndarray:
    """(16, 16) float32: how much of each cell the subjects cover, with their rims, from 0 to 1."""
    mask = np.zeros((GRID, GRID), np.float32)
    for subject in scene.subjects:
        box = _box_with_margin(mask, subject, 1)
        np.maximum(box, _covered_cells(subject.kind, subject.cells), out=box)
    return mask


@lru_cache(maxsize=512)
def _covered_cells(kind: str, cells: int, cell: int = 8) -> np.ndarray:
    rim = subject_layers(kind, cells, cell).rim
    return rim.reshape(cells + 2, cell, cells + 2, cell).mean((1, 3))


def _box_with_margin(picture: np.ndarray, subject: Subject, cell: int) -> np.ndarray:
    """The part of a picture that a subject is drawn into: its box and one cell more on every side, as a view."""
    side = (subject.cells + 2) * cell
    return picture[(subject.row - 1) * cell :, (subject.column - 1) * cell :][:side, :side]


def write_folder(folder: str | Path, count: int, split: str = "train", resolution: int = 256, start: int = 0,
                 of: str = "glyphs", progress: Callable[[int], object] | None = None) -> None:  # fmt: skip
    """Writes scenes `start` … `start + count − 1` as an image-text folder: `000000.png`, `000000.txt`, `000000.json`.

    The JSON holds what is in the scene. Images that are there already are kept, so an interrupted run can be resumed.
    """
    from dalle_pytorch.files.atomic import write_text
    from dalle_pytorch.files.images import save_image

    folder = Path(folder)
    for index in range(start, start + count):
        scene = make_scene(index, split, of=of)
        stem = folder / f"{index:06d}"
        if not stem.with_suffix(".png").exists():
            facts = {"subjects": [vars(subject) for subject in scene.subjects], "background": scene.background,
                     "place": scene.place, "relation": scene.relation}  # fmt: skip
            write_text(stem.with_suffix(".txt"), scene.caption + "\n")
            write_text(stem.with_suffix(".json"), json.dumps(facts) + "\n")
            save_image(stem.with_suffix(".png"), Image.fromarray(draw(scene, resolution)))
        if progress:
            progress(index - start + 1)
