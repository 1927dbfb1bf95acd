"""Scenes by their number: lots are drawn for all that is in one, always the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dalle_pytorch.errors import UsageError
from dalle_pytorch.scenes import world
from dalle_pytorch.scenes.captions import COMPLETE, LEFT_OPEN, write_caption
from dalle_pytorch.scenes.things import THINGS
from dalle_pytorch.scenes.world import Scene, Subject, can_have, split_of_scene

# Where two subjects stand: the upper left corners of the left or upper one and of the other.
CORNERS: dict[str | None, tuple[tuple[int, int], tuple[int, int]]] = {
    "left": ((1, 5), (9, 5)), "above": ((5, 1), (5, 9))}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """How the subjects of scenes are chosen: from `kinds`, the share `things` of them things where there are both; of
    those the share `natural` in their own colours; and of all the share `made` of a material."""

    kinds: tuple[str, ...]
    things: float | None = None
    natural: float = 0.0
    made: float = 0.0

    @cached_property
    def weights(self) -> list[float] | None:
        if self.things is None:
            return None
        things = sum(kind in THINGS for kind in self.kinds)
        return [self.things / things if kind in THINGS else (1 - self.things) / (len(self.kinds) - things)
                for kind in self.kinds]  # fmt: skip


MIXTURES = {
    "glyphs": Mixture(world.GLYPHS),
    "things": Mixture(tuple(THINGS), natural=1.0),
    "recoloured": Mixture(tuple(THINGS)),
    "made": Mixture(world.SUBJECTS, things=0.7, made=1.0),
    "everything": Mixture(world.SUBJECTS, things=0.75, natural=0.65, made=0.08),
    # The same with more of what is hardest to learn: each pair of a thing and a colour or a material is rare.
    "painted": Mixture(world.SUBJECTS, things=0.78, natural=0.22, made=0.28),
}


def make_scene(index: int, split: str = "train", num_subjects: int | None = None, of: str = "glyphs") -> Scene:
    """Scene number `index` of a split, always the same. `num_subjects` 1 or 2 fixes what is otherwise drawn by lot;
    `of` names one of MIXTURES.

    Captions of training leave a colour, a kind or the background open now and then; those of the other splits never do,
    and so always name a combination that training did not show.
    """
    if split not in world.SPLITS:
        raise UsageError(f"expected a split of {', '.join(world.SPLITS)}, got {split!r}")
    if of not in MIXTURES:
        raise UsageError(f"expected scenes of {', '.join(MIXTURES)}, got {of!r}")
    mixture, left_open = MIXTURES[of], LEFT_OPEN if split == "train" else COMPLETE
    rng = np.random.default_rng([world.SPLITS.index(split), num_subjects or 0, index])
    while True:
        scene = _draw_lots(rng, num_subjects or int(rng.integers(1, 3)), left_open, mixture)
        if split_of_scene(scene.subjects, scene.background) == split:
            return scene


def _draw_lots(rng: np.random.Generator, num_subjects: int, left_open: Mapping[str, float],
               mixture: Mixture) -> Scene:  # fmt: skip
    background = str(rng.choice(world.BACKGROUNDS))
    kinds = rng.choice(mixture.kinds, num_subjects, replace=False, p=mixture.weights)
    colours = rng.choice(list(world.COLOURS), num_subjects, replace=False)
    if mixture.kinds != world.GLYPHS:  # which have no other colours
        colours = [_colour(rng, kind, colour, mixture) for kind, colour in zip(kinds, colours, strict=True)]
    place = relation = None
    if num_subjects == 1:
        # A big subject fills the middle; a small one stands where one of two might stand, or in the middle.
        size = "big" if rng.random() < world.BIG_SHARE else "small"
        place = "middle" if size == "big" else str(rng.choice(world.PLACES))
        sizes, corners = [size], (_corner(place, world.SIZES[size]),)
    else:
        relation = str(rng.choice(world.RELATIONS))
        sizes, corners = ["small", "small"], CORNERS[relation]
    parts = zip(kinds, colours, sizes, corners, strict=True)
    subjects = tuple(Subject(str(kind), str(colour), size, *corner) for kind, colour, size, corner in parts)
    caption = write_caption(rng, subjects, background, place, relation, left_open)
    variant, grain_seed = int(rng.integers(world.VARIANTS)), int(rng.integers(2**31))
    return Scene(subjects, background, variant, grain_seed, caption, place, relation)


def _colour(rng: np.random.Generator, kind: str, colour: str, mixture: Mixture) -> str:
    """The colour of a subject: a material, its natural one, or `colour`, if need be another that it can have."""
    if rng.random() < mixture.made:
        return str(rng.choice(world.MATERIALS))
    if kind in THINGS and rng.random() < mixture.natural:
        return world.NATURAL
    while not can_have(kind, colour):
        colour = str(rng.choice(list(world.COLOURS)))
    return colour


def _corner(place: str, cells: int) -> tuple[int, int]:
    middle, end = (world.GRID - cells) // 2, world.GRID - cells - 1
    words = place.split()
    column = 1 if "left" in words else end if "right" in words else middle
    row = 1 if {"top", "upper"} & {*words} else end if {"bottom", "lower"} & {*words} else middle
    return column, row
