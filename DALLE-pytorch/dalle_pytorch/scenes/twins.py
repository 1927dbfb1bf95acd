"""Pairs of scenes that differ in one fact, and their captions in what is said of it.

A caption with a fact made wrong teaches CLIP what a picture is not called. A picture with a fact made wrong teaches it
what a caption does not show, where words hardly differ: a subject drawn twice, colours or places exchanged.
"""

from dataclasses import replace

import numpy as np

from dalle_pytorch.scenes import world
from dalle_pytorch.scenes.captions import (
    LEFT_OPEN,
    TERSE,
    UNPLACED,
    alike,
    names_subjects_apart,
    states_place,
    with_caption,
)
from dalle_pytorch.scenes.scenes import CORNERS
from dalle_pytorch.scenes.world import COLOURS, GLYPHS, Scene, Subject, can_have, split_of_scene

# How often which fact is changed, in a scene of one subject and of two.
ONE = {"kind": 3, "colour": 2, "background": 1, "doubled": 2}
TWO = {"kind": 3, "colour": 2, "background": 1, "doubled": 2, "left out": 2, "colours": 2, "places": 2}
# In scenes of two that are to teach which colour belongs to which, in captions that do not say which is where: the
# rarest of pairs, and the only ones that places do not tell apart.
EXCHANGED = {"colours": 8, "doubled": 1}
# What the place of either of two subjects is called when it is alone.
ALONE: dict[str | None, tuple[str, str]] = {"left": ("left", "right"), "above": ("top", "bottom")}


def make_twins(scene: Scene, seed: int = 0, terse: bool = False,
               exchanged: bool = False) -> tuple[Scene, Scene, str]:  # fmt: skip
    """The scene with a new caption, its twin, which is of the same split and has one fact changed that the caption
    states, and that fact, by its name in `ONE` or `TWO`.

    It is a subject's kind or colour or the background; the same subject twice; or of two subjects one alone, their
    colours exchanged, or their places. Captions are such as training has, or terse as in `with_terse_caption`.
    `exchanged` is for scenes of two subjects: their colours are exchanged, where that is possible, and the captions do
    not say which is where.
    """
    rng = np.random.default_rng([len(world.SPLITS) + 2, seed])
    left_open = UNPLACED if exchanged else TERSE if terse else LEFT_OPEN
    split = split_of_scene(scene.subjects, scene.background)
    shares = EXCHANGED if exchanged else ONE if scene.relation is None else TWO
    facts, weights = [*shares], np.array([*shares.values()]) / sum(shares.values())
    while True:  # A doubled subject will always do.
        fact = str(rng.choice(facts, p=weights))
        twin, lots = change_scene(scene, fact, rng), int(rng.integers(2**31))
        # The same lots for both captions: the same words, but for the fact.
        scene, twin = (with_caption(each, np.random.default_rng(lots), left_open) for each in (scene, twin))
        possible = all(can_have(subject.kind, subject.colour) for subject in twin.subjects)
        if possible and split_of_scene(twin.subjects, twin.background) == split and _told_apart(scene, twin, fact):
            return scene, twin, fact


def change_scene(scene: Scene, fact: str, rng: np.random.Generator) -> Scene:
    """The scene with a fact of `ONE` or `TWO` changed, and its caption left as it was."""
    subjects, which = [*scene.subjects], int(rng.integers(len(scene.subjects)))
    subject = subjects[which]
    if fact == "background":
        return replace(
            scene, background=str(rng.choice([name for name in world.BACKGROUNDS if name != scene.background]))
        )
    if fact == "left out":
        return replace(scene, subjects=(subject,), relation=None, place=ALONE[scene.relation][which])
    if fact == "doubled":
        return _side_by_side(scene, [subject, subject], scene.relation or str(rng.choice(world.RELATIONS)))
    if fact == "places":
        return _side_by_side(scene, subjects[::-1], scene.relation)
    if fact == "colours":
        first, second = subjects
        return replace(scene, subjects=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    held = {getattr(each, fact) for each in subjects}
    if fact == "kind":
        values = [kind for kind in alike(subject.kind) if can_have(kind, subject.colour)]
    else:
        values = [*COLOURS] if subject.kind in GLYPHS else [*COLOURS, *world.MATERIALS, world.NATURAL]
        values = [colour for colour in values if can_have(subject.kind, colour)]
    subjects[which] = replace(subject, **{fact: str(rng.choice([value for value in values if value not in held]))})
    return replace(scene, subjects=tuple(subjects))


def _side_by_side(scene: Scene, subjects: list[Subject], relation: str | None) -> Scene:
    subjects = [replace(subject, size="small", column=column, row=row)
                for subject, (column, row) in zip(subjects, CORNERS[relation], strict=True)]  # fmt: skip
    return replace(scene, subjects=tuple(subjects), relation=relation, place=None)


def _told_apart(scene: Scene, twin: Scene, fact: str) -> bool:
    """Whether the captions state the fact, so that each is wrong of the other's picture."""
    if scene.caption == twin.caption:
        return False
    if fact == "places":  # "a seven and a star" may be told in either order
        return states_place(scene)
    return fact != "colours" or names_subjects_apart(scene)
