"""The glyphs world: scenes drawn by code, with captions that say everything that is in them.

A scene is one or two subjects (a digit, a letter or a shape, in a colour, big or small, at a place) on a background.
A subject is a sticker: a white rim, about as wide as one image token, keeps its colour and the background out of the
same token. Scene `i` of a split is always the same, and is drawn at any resolution: subjects and textures lie on a
16×16 grid, so that image tokens can carry them, and every texture has a fine grain below it, on a 256×256 lattice, that
only a picture of 256 pixels shows. Tokens cannot carry the grain: the diffusion decoder has to invent it.

Some combinations of subject, colour and background never appear in training. A scene that holds one is a test scene,
or one for validation: what is chosen during development is chosen on these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

GRID = 16  # subjects and textures are laid out on this many cells a side: one cell is one image token
GRAIN = 256  # cells a side of the lattice that carries the fine grain
SUPERSAMPLE = 2
RIM = 0.8  # width in grid cells of the white rim around a subject, inside a margin of one cell around its box
RIM_COLOUR = (252, 252, 250)

COLOURS = {
    "red": (222, 38, 38),
    "orange": (245, 132, 22),
    "yellow": (250, 208, 36),
    "green": (38, 160, 62),
    "cyan": (40, 196, 212),
    "blue": (38, 78, 222),
    "purple": (130, 48, 182),
    "pink": (246, 122, 184),
    "brown": (128, 78, 42),
    "lime": (164, 220, 40),
    "gray": (142, 146, 152),
    "black": (44, 44, 50),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple(f"letter {name}" for name in "acefhkmptuxy")  # none that could be taken for a digit or for another
SHAPES = ("star", "heart", "circle", "square", "triangle", "diamond", "cross", "moon", "arrow", "house", "cloud",
          "drop", "bolt", "flower", "tree", "crown", "fish")  # fmt: skip
SUBJECTS = DIGITS + LETTERS + SHAPES
BACKGROUNDS = ("white", "black", "brick", "wood", "water", "lego", "checks", "stripes", "dots", "tiles", "grass",
               "sand", "marble", "plaid", "zigzags", "night")  # fmt: skip
SIZES = {"big": 10, "small": 6}  # side in grid cells
PLACES = ("middle", "left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right")
RELATIONS = ("left", "above")  # where the first subject of two stands, seen from the second
BIG_SHARE = 0.4  # of single subjects
VARIANTS = 4  # ways in which the pattern of one background can lie

SPLITS = ("train", "test", "validation")
HELD_OUT = {"test": 0.1, "validation": 0.04}  # shares of all combinations; the rest is for training
# How often a caption does without a fact, or a word: in a complete one, in one of training, in a terse one.
COMPLETE = {"colour": 0.0, "kind": 0.0, "background": 0.0, "place": 0.5, "size": 0.5, "relation": 0.1, "frame": 0.75,
            "article": 0.1}  # fmt: skip
# Two subjects of which is not said which is where are the hardest to draw, each once: training has more of them.
LEFT_OPEN = COMPLETE | {"colour": 0.15, "kind": 0.1, "background": 0.2, "relation": 0.25}
TERSE = {"colour": 0.75, "kind": 0.1, "background": 0.85, "place": 0.9, "size": 0.9, "relation": 0.25, "frame": 1.0,
         "article": 0.2}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One thing in a scene; `column` and `row` are its upper left corner in grid cells."""

    kind: str
    colour: str
    size: str
    column: int
    row: int

    @property
    def cells(self) -> int:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """All that is in a picture. Of two subjects the first is the left or the upper one."""

    subjects: tuple[Subject, ...]
    background: str
    variant: int
    grain_seed: int
    caption: str
    place: str | None = None  # of a single subject
    relation: str | None = None  # of two: "left" or "above"


# --------------------------------------------------------------------------------------------------
# What is in a scene


@cache
def split_of(kind: str, colour: str, background: str) -> str:
    """The split that this combination belongs to, by a hash of its names."""
    digest = hashlib.sha256(f"{kind} {colour} {background}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def _split_of_scene(subjects: tuple[Subject, ...], background: str) -> str:
    splits = {split_of(subject.kind, subject.colour, background) for subject in subjects}
    return next((split for split in HELD_OUT if split in splits), "train")


def make_scene(index: int, split: str = "train", num_subjects: int | None = None) -> Scene:
    """Scene number `index` of a split, always the same. `num_subjects` 1 or 2 fixes what is otherwise drawn by lot.

    Captions of training leave a colour, a kind or the background open now and then; those of the other splits never do,
    and so always name a combination that training did not show.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), num_subjects or 0, index])
    while True:
        scene = _draw_lots(rng, num_subjects or int(rng.integers(1, 3)), LEFT_OPEN if split == "train" else COMPLETE)
        if _split_of_scene(scene.subjects, scene.background) == split:
            return scene


def _draw_lots(rng: np.random.Generator, num_subjects: int, left_open: Mapping[str, float]) -> Scene:
    background = str(rng.choice(BACKGROUNDS))
    kinds = rng.choice(SUBJECTS, num_subjects, replace=False)
    colours = rng.choice(list(COLOURS), num_subjects, replace=False)
    place = relation = None
    if num_subjects == 1:
        # A big subject fills the middle; a small one stands where one of two might stand, or in the middle.
        size = "big" if rng.random() < BIG_SHARE else "small"
        place = "middle" if size == "big" else str(rng.choice(PLACES))
        sizes, corners = [size], [_corner(place, SIZES[size])]
    else:
        relation = str(rng.choice(RELATIONS))
        sizes = ["small", "small"]
        corners = [(1, 5), (9, 5)] if relation == "left" else [(5, 1), (5, 9)]
    subjects = tuple(
        Subject(str(kind), str(colour), size, *corner)
        for kind, colour, size, corner in zip(kinds, colours, sizes, corners, strict=True)
    )
    caption = _caption(rng, subjects, background, place, relation, left_open)
    return Scene(subjects, background, int(rng.integers(VARIANTS)), int(rng.integers(2**31)), caption, place, relation)


def _corner(place: str, cells: int) -> tuple[int, int]:
    middle, end = (GRID - cells) // 2, GRID - cells - 1
    words = place.split()
    column = 1 if "left" in words else end if "right" in words else middle
    row = 1 if {"top", "upper"} & {*words} else end if {"bottom", "lower"} & {*words} else middle
    return column, row


# --------------------------------------------------------------------------------------------------
# Captions

_ON_BACKGROUND = {
    "white": ("on white", "on a white background"),
    "black": ("on black", "on a black background"),
    "brick": ("on brick", "on a brick wall"),
    "wood": ("on wood", "on a wooden floor"),
    "water": ("on water", "on the water"),
    "lego": ("on lego", "on a lego board"),
    "checks": ("on checks", "on a checkered background"),
    "stripes": ("on stripes", "on a striped background"),
    "dots": ("on dots", "on polka dots"),
    "tiles": ("on tiles", "on a tiled wall"),
    "grass": ("on grass", "on the lawn"),
    "sand": ("on sand", "on the beach"),
    "marble": ("on marble", "on a marble floor"),
    "plaid": ("on plaid", "on a plaid blanket"),
    "zigzags": ("on zigzags", "on a zigzag pattern"),
    "night": ("on a night sky", "on a starry sky"),
}
_AT_PLACE = {
    "middle": ("in the middle", "in the center"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    **{corner: (f"in the {corner} corner",) for corner in PLACES if " " in corner},
}
_SIZE_NAMES = {"big": ("big", "large"), "small": ("small", "little")}
_RELATED = {"left": ("to the left of", "left of"), "above": ("above", "over")}
_REVERSED = {"left": ("to the right of", "right of"), "above": ("below", "under")}
_TOGETHER = {"left": ("and", "next to", "beside"), "above": ("and",)}  # which is where is left open
_NAMES = {kind: (kind,) for kind in SUBJECTS} | {kind: (kind, str(i)) for i, kind in enumerate(DIGITS)}
_NAMES |= {kind: (kind, kind[-1]) for kind in LETTERS if kind != "letter a"}  # "a" alone is the article
# For a caption that names no kind.
_FAMILY = {kind: family for family, kinds in (("digit", DIGITS), ("letter", LETTERS), ("shape", SHAPES))
           for kind in kinds}  # fmt: skip


def _caption(
    rng: np.random.Generator,
    subjects: tuple[Subject, ...],
    background: str,
    place: str | None,
    relation: str | None,
    left_open: Mapping[str, float],
) -> str:
    def leaves_open(fact: str) -> bool:
        return rng.random() < left_open[fact]

    without_article = leaves_open("article")

    def name(subject: Subject, with_size: bool) -> str:
        colour, (kind, *others) = subject.colour, _NAMES[subject.kind]
        if others and rng.random() < 0.25:
            kind = str(rng.choice(others))
        if leaves_open("colour"):
            colour = ""
        elif leaves_open("kind"):
            kind = _FAMILY[subject.kind]
        size = str(rng.choice(_SIZE_NAMES[subject.size])) if with_size else ""
        words = " ".join(filter(None, (size, colour, kind)))
        return words if without_article else f"{_article(words)} {words}"

    on = "" if leaves_open("background") else str(rng.choice(_ON_BACKGROUND[background]))
    if len(subjects) == 1:
        what = name(subjects[0], with_size=not leaves_open("size"))
        if not leaves_open("place"):
            what += f" {rng.choice(_AT_PLACE[place])}"
    else:
        first, second = (name(subject, with_size=False) for subject in subjects)
        roll, said = rng.random(), 1 - left_open["relation"]
        if roll < said / 2:
            what = f"{first} {rng.choice(_RELATED[relation])} {second}"
        elif roll < said:
            what = f"{second} {rng.choice(_REVERSED[relation])} {first}"
        else:
            together = rng.choice(_TOGETHER[relation])
            what = f" {together} ".join([first, second] if rng.random() < 0.5 else [second, first])
    caption = f"{what} {on}".rstrip()
    if not leaves_open("frame"):
        caption = f"a {rng.choice(['picture', 'drawing', 'photo'])} of {caption}"
    return caption


def with_terse_caption(scene: Scene, seed: int = 0) -> Scene:
    """The scene with a caption that says little of it, often no more than "a seven"."""
    rng = np.random.default_rng([len(SPLITS) + 1, seed])
    caption = _caption(rng, scene.subjects, scene.background, scene.place, scene.relation, TERSE)
    return replace(scene, caption=caption)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def states_place(scene: Scene) -> bool:
    """Whether the caption says where the subject is, or which of two is where."""
    tables = (_RELATED, _REVERSED) if scene.relation else (_AT_PLACE,)
    phrases = [phrase for table in tables for phrase in table[scene.relation or scene.place]]
    return any(f" {phrase} " in f"{scene.caption} " for phrase in phrases)


def states_size(scene: Scene) -> bool:
    """Whether the caption says how big the subject is."""
    return any(f" {name} " in f" {scene.caption} " for names in _SIZE_NAMES.values() for name in names)


def change_caption(scene: Scene, seed: int = 0) -> str:
    """The caption with one fact made wrong: a subject, colour, size, place or background; of two subjects also which is
    where, which has which colour, or that there are two.

    Hard negatives for CLIP. Only what the caption says can be made wrong. Of a training scene no combination of another
    split comes out: CLIP would learn that it is never true.
    """
    rng = np.random.default_rng([len(SPLITS), seed])
    caption = f" {scene.caption} "
    held = {value for subject in scene.subjects for value in (subject.kind, subject.colour)}
    split = _split_of_scene(scene.subjects, scene.background)
    wrong: list[list[str]] = []  # of every fact that is said, the captions that have it wrong

    def allowed(kind: str, colour: str, background: str) -> bool:
        return split != "train" or split_of(kind, colour, background) == "train"

    def in_place_of(phrases: Iterable[str], others: Iterable[str]) -> list[str]:
        phrase = next((phrase for phrase in phrases if f" {phrase} " in caption), None)
        return [caption.replace(f" {phrase} ", f" {other} ").strip() for other in others] if phrase else []

    def exchanged_colours() -> list[str]:
        first, second = scene.subjects
        named = any(f" {name} " in caption for subject in scene.subjects for name in _NAMES[subject.kind])
        if not named and _FAMILY[first.kind] == _FAMILY[second.kind]:
            return []  # "a red digit and a blue digit" would still be true
        if not all(allowed(a.kind, b.colour, scene.background) for a, b in ((first, second), (second, first))):
            return []
        exchange = {first.colour: second.colour, second.colour: first.colour}
        on = _background_said(scene)
        said = scene.caption.removesuffix(on).split()
        out = [exchange.get(word, word) for word in said]
        return [" ".join(out) + on] if out != said else []

    for subject in scene.subjects:
        kinds = [name for name in SUBJECTS if name not in held and allowed(name, subject.colour, scene.background)]
        colours = [name for name in COLOURS if name not in held and allowed(subject.kind, name, scene.background)]
        # As likely as four other facts: what the subject is, is the hardest to see.
        wrong += [in_place_of(_NAMES[subject.kind], [name for other in kinds for name in _NAMES[other]])] * 4
        # With its subject, for "black" may be said of the background too.
        for name in (*_NAMES[subject.kind], _FAMILY[subject.kind]):
            wrong.append(in_place_of([f"{subject.colour} {name}"], [f"{colour} {name}" for colour in colours]))
        wrong.append(in_place_of(_SIZE_NAMES[subject.size], [name for size in SIZES if size != subject.size
                                                             for name in _SIZE_NAMES[size]]))  # fmt: skip
    backgrounds = [name for name in BACKGROUNDS
                   if all(allowed(subject.kind, subject.colour, name) for subject in scene.subjects)]  # fmt: skip
    for table, true, possible in ((_ON_BACKGROUND, scene.background, backgrounds), (_AT_PLACE, scene.place, PLACES)):
        wrong.append(in_place_of(table.get(true, ()), [other for name in possible if name != true
                                                       for other in table[name]]))  # fmt: skip
    if scene.relation:
        for said, opposite in ((_RELATED, _REVERSED), (_REVERSED, _RELATED)):
            wrong.append(in_place_of(said[scene.relation], opposite[scene.relation]))
        wrong += [_without_a_subject(scene), exchanged_colours()]
    wrong = [captions for captions in wrong if captions]
    captions = wrong[int(rng.integers(len(wrong)))]
    out = captions[int(rng.integers(len(captions)))].split()
    # "a" before a vowel, "an" before none; the letter stays what it is
    for i, word in enumerate(out[:-1]):
        if word in ("a", "an") and out[max(i - 1, 0)] != "letter":
            out[i] = _article(out[i + 1])
    return " ".join(out)


def _without_a_subject(scene: Scene) -> list[str]:
    """The two captions that a scene of two subjects would have if one of them were all there is."""
    said = (*_RELATED[scene.relation], *_REVERSED[scene.relation], *_TOGETHER[scene.relation])
    first, _, second = next(parts for phrase in said if (parts := scene.caption.partition(f" {phrase} "))[1])
    return [first + _background_said(scene), second]


def _background_said(scene: Scene) -> str:
    """What the caption says of the background, at its end: " on sand", or nothing."""
    phrases = (f" {phrase}" for phrase in _ON_BACKGROUND[scene.background])
    return next((phrase for phrase in phrases if scene.caption.endswith(phrase)), "")


def words() -> frozenset[str]:
    """Every word that a caption can hold: what the default model has seen."""
    tables = (_ON_BACKGROUND, _AT_PLACE, _SIZE_NAMES, _RELATED, _REVERSED, _TOGETHER)
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [name for names in _NAMES.values() for name in names]
    phrases += [*COLOURS, *_FAMILY.values(), "a an of picture drawing photo"]
    return frozenset(" ".join(phrases).split())


# --------------------------------------------------------------------------------------------------
# Subjects: signed distances in a box of [-1, 1]², negative inside


def _arc(
    cx: float, cy: float, rx: float, ry: float, start: float, end: float, points: int = 24
) -> list[tuple[float, float]]:
    """Points of an ellipse from `start` to `end` degrees; 0 is right, 90 is down."""
    angles = np.radians(np.linspace(start, end, points))
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in angles]


_STROKES: dict[str, list[list[tuple[float, float]]]] = {
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
    "letter p": [[(-0.36, 0.72), (-0.36, -0.7), (0.1, -0.7), *_arc(0.1, -0.28, 0.42, 0.42, -90, 90, 16),
                  (-0.36, 0.14)]],
    "letter t": [[(-0.56, -0.7), (0.56, -0.7)], [(0, -0.7), (0, 0.72)]],
    "letter u": [[(-0.48, -0.7), *_arc(0, 0.2, 0.48, 0.5, 180, 0, 24), (0.48, -0.7)]],
    "letter x": [[(-0.5, -0.7), (0.5, 0.7)], [(0.5, -0.7), (-0.5, 0.7)]],
    "letter y": [[(-0.52, -0.7), (0, 0)], [(0.52, -0.7), (0, 0), (0, 0.72)]],
}
_STROKE_RADIUS = 0.2


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


_POLYGONS: dict[str, list[tuple[float, float]]] = {
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
    if kind in _STROKES:
        for stroke in _STROKES[kind]:
            for a, b in pairwise(stroke):
                distance = np.minimum(distance, _segment_distance(x, y, a, b))
        return distance - _STROKE_RADIUS
    points = _POLYGONS[kind]
    inside = np.zeros(x.shape, bool)
    for a, b in zip(points, points[1:] + points[:1], strict=True):
        distance = np.minimum(distance, _segment_distance(x, y, a, b))
        if a[1] != b[1]:
            crossing = (a[1] > y) != (b[1] > y)
            inside ^= crossing & (x < (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) + a[0])
    return np.where(inside, -distance, distance) - 0.03


@dataclass(frozen=True)
class _Layers:
    """How much of each pixel a part of a subject covers, and the light on its fill, each (side, side) in [0, 1].

    `side` is that of the subject's box with a margin of one cell all around.
    """

    shadow: np.ndarray
    rim: np.ndarray
    outline: np.ndarray
    fill: np.ndarray
    light: np.ndarray


@lru_cache(maxsize=256)
def _subject_layers(kind: str, cells: int, cell: int) -> _Layers:
    """The layers of a subject of `cells` grid cells a side, `cell` pixels each."""
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
    return _Layers(*(_shrink(layer.astype(np.float32)) for layer in layers))


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Averages SUPERSAMPLE × SUPERSAMPLE blocks."""
    height, width = (side // SUPERSAMPLE for side in picture.shape[:2])
    return picture.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, *picture.shape[2:]).mean((1, 3))


# --------------------------------------------------------------------------------------------------
# Backgrounds: colour as a function of the place in grid cells, (h, w) each, and of the variant


def _hash01(*integers: np.ndarray | int) -> np.ndarray:
    """A fixed pseudo-random number in [0, 1) for every tuple of integers."""
    state = np.uint32(2166136261)
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
    return np.where(mortar[..., None], np.float32((198, 190, 180)), colour)


def _wood(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    plank = np.floor(y / 4)
    along = x + 4 * ((plank * (1 + variant % 2) + variant) % 4)
    board = np.floor(along / 16)
    seam = ((y % 4) < 0.22) | ((along % 16) < 0.22)
    tone = ((plank + board + variant // 2) % 2) * 0.6
    bands = 0.5 + 0.5 * np.sin(2 * np.pi * (y % 4 + 0.25 * np.sin(2 * np.pi * along / 8)) / 1.0)
    colour = _mix((186, 138, 88), (150, 104, 62), np.clip(tone + 0.35 * bands, 0, 1))
    return np.where(seam[..., None], np.float32((92, 60, 36)), colour)


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
    return np.float32((168, 172, 176)) * light[..., None]


def _checks(x: np.ndarray, y: np.ndarray, variant: int) -> np.ndarray:
    return _mix(
        (226, 220, 206), (128, 138, 150), (np.floor(x / 2 + variant % 2) + np.floor((y + variant // 2) / 2)) % 2
    )


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
    return np.where(grout, np.float32((170, 176, 180)), colour)


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
    return np.where(thread[..., None], np.float32((236, 206, 120)), colour)


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


_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "white": partial(_plain, (244, 243, 240)),
    "black": partial(_plain, (30, 30, 34)),
    "brick": _brick,
    "wood": _wood,
    "water": _water,
    "lego": _lego,
    "checks": _checks,
    "stripes": _stripes,
    "dots": _dots,
    "tiles": _tiles,
    "grass": _grass,
    "sand": _sand,
    "marble": _marble,
    "plaid": _plaid,
    "zigzags": _zigzags,
    "night": _night,
}
# Strength of the grain in grey levels, and how far it is smeared along x and along y, in lattice cells.
_GRAIN_OF = {
    "white": (7, 1, 1),
    "black": (10, 1, 1),
    "brick": (26, 1, 1),
    "wood": (34, 24, 1),
    "water": (24, 8, 1),
    "lego": (7, 1, 1),
    "checks": (18, 1, 8),
    "stripes": (18, 8, 1),
    "dots": (14, 1, 1),
    "tiles": (10, 1, 1),
    "grass": (26, 1, 6),
    "sand": (28, 1, 1),
    "marble": (14, 6, 1),
    "plaid": (24, 4, 1),
    "zigzags": (16, 1, 4),
    "night": (12, 1, 1),
}


@lru_cache(maxsize=128)
def _background(name: str, variant: int, resolution: int) -> np.ndarray:
    side = resolution * SUPERSAMPLE
    axis = ((np.arange(side) + 0.5) / side * GRID).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return _shrink(_TEXTURES[name](x, y, variant).astype(np.float32))


def _grain(name: str, seed: int, resolution: int) -> np.ndarray:
    """(resolution, resolution, 1) grey levels to add: white noise on the lattice, smeared the way the material runs.

    Blocks of 2 × 2 lattice cells sum to zero, so at half the lattice's resolution or below there is nothing left of it.
    """
    strength, along_x, along_y = _GRAIN_OF[name]
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


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(scene: Scene, resolution: int = 256) -> np.ndarray:
    """The picture of a scene: (resolution, resolution, 3) uint8. `resolution` is a multiple of 16 pixels."""
    if resolution % GRID:
        raise ValueError(f"the resolution is a multiple of {GRID} pixels, and {resolution} is not")
    cell = resolution // GRID
    picture = _background(scene.background, scene.variant, resolution).copy()
    if resolution > GRAIN // 2:
        picture += _grain(scene.background, scene.grain_seed, resolution)
    for subject in scene.subjects:
        layers = _subject_layers(subject.kind, subject.cells, cell)
        colour = np.asarray(COLOURS[subject.colour], np.float32)
        box = _box_with_margin(picture, subject, cell)
        box *= 1 - 0.45 * layers.shadow[..., None]
        box += (np.asarray(RIM_COLOUR, np.float32) - box) * layers.rim[..., None]
        box += (colour * 0.28 - box) * layers.outline[..., None]
        box += (colour * layers.light[..., None] - box) * layers.fill[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def subject_mask(scene: Scene) -> np.ndarray:
    """(16, 16) float32: how much of each cell the subjects cover, with their rims, from 0 to 1."""
    mask = np.zeros((GRID, GRID), np.float32)
    for subject in scene.subjects:
        box = _box_with_margin(mask, subject, 1)
        np.maximum(box, _covered_cells(subject.kind, subject.cells), out=box)
    return mask


@lru_cache(maxsize=256)
def _covered_cells(kind: str, cells: int, cell: int = 8) -> np.ndarray:
    rim = _subject_layers(kind, cells, cell).rim
    return rim.reshape(cells + 2, cell, cells + 2, cell).mean((1, 3))


def _box_with_margin(picture: np.ndarray, subject: Subject, cell: int) -> np.ndarray:
    """The part of a picture that a subject is drawn into: its box and one cell more on every side, as a view."""
    side = (subject.cells + 2) * cell
    return picture[(subject.row - 1) * cell :, (subject.column - 1) * cell :][:side, :side]


def write_folder(
    folder: str | Path,
    count: int,
    split: str = "train",
    resolution: int = 256,
    start: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes scenes `start` … `start + count − 1` as an image-text folder: `000000.png`, `000000.txt`, `000000.json`.

    The JSON holds what is in the scene. Pictures already there are kept, so a broken-off run goes on where it was.
    """
    from dalle_pytorch.checkpoints import write_text
    from dalle_pytorch.files import save_image

    folder = Path(folder)
    for index in range(start, start + count):
        scene = make_scene(index, split)
        stem = folder / f"{index:06d}"
        if not stem.with_suffix(".png").exists():
            facts = {
                "subjects": [vars(subject) for subject in scene.subjects],
                "background": scene.background, "place": scene.place, "relation": scene.relation,
            }  # fmt: skip
            write_text(stem.with_suffix(".txt"), scene.caption + "\n")
            write_text(stem.with_suffix(".json"), json.dumps(facts) + "\n")
            save_image(stem.with_suffix(".png"), Image.fromarray(draw(scene, resolution)))
        if progress:
            progress(index - start + 1)
