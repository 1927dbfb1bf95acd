"""What there is in a scene: subjects, colours, backgrounds, places, and the splits of their combinations."""

import hashlib
from dataclasses import dataclass
from functools import cache

from dalle_pytorch.scenes.things import NATURAL_COLOURS, THINGS

GRID = 16  # subjects and textures are laid out on this many cells a side: one cell is one image token

COLOURS = {
    "red": (222, 38, 38), "orange": (245, 132, 22), "yellow": (250, 208, 36), "green": (38, 160, 62),
    "cyan": (40, 196, 212), "blue": (38, 78, 222), "purple": (130, 48, 182), "pink": (246, 122, 184),
    "brown": (128, 78, 42), "lime": (164, 220, 40), "gray": (142, 146, 152), "black": (44, 44, 50),
}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple(f"letter {name}" for name in "acefhkmptuxy")  # none that could be taken for a digit or for another
SHAPES = ("star", "heart", "circle", "square", "triangle", "diamond", "cross", "moon", "arrow", "house", "cloud",
          "drop", "bolt", "flower", "tree", "crown", "fish")  # fmt: skip
GLYPHS = DIGITS + LETTERS + SHAPES
SUBJECTS = GLYPHS + tuple(THINGS)
BACKGROUNDS = ("white", "black", "brick", "wood", "water", "lego", "checks", "stripes", "dots", "tiles", "grass",
               "sand", "marble", "plaid", "zigzags", "night")  # fmt: skip
# What a subject can be made of instead of being of a colour. Things have colours of their own, too.
MATERIALS = ("brick", "wood", "water", "grass", "plaid", "dots")
NATURAL = "natural"
SIZES = {"big": 10, "small": 6}  # side in grid cells
PLACES = ("middle", "left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right")
RIM = 0.8  # width in grid cells of the white rim around a subject, inside a margin of one cell around its box
RELATIONS = ("left", "above")  # where the first subject of two stands, seen from the second
BIG_SHARE = 0.4  # of single subjects
VARIANTS = 4  # ways in which the pattern of one background can lie

SPLITS = ("train", "test", "validation")
HELD_OUT = {"test": 0.1, "validation": 0.04}  # shares of all combinations; the rest is for training


@dataclass(frozen=True)
class Subject:
    """One glyph or thing in a scene; `column` and `row` are its upper left corner in grid cells."""

    kind: str
    colour: str  # of COLOURS or MATERIALS; NATURAL for a thing as it is
    size: str
    column: int
    row: int

    @property
    def cells(self) -> int:
        return SIZES[self.size]


def can_have(kind: str, colour: str) -> bool:
    """Whether there are subjects of this kind in this colour: NATURAL is for things, and a thing is not recoloured to
    what it is by nature."""
    return kind in THINGS if colour == NATURAL else colour not in NATURAL_COLOURS.get(kind, ())


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


def split_of_scene(subjects: tuple[Subject, ...], background: str) -> str:
    splits = {split_of(subject.kind, subject.colour, background) for subject in subjects}
    return next((split for split in HELD_OUT if split in splits), "train")
