"""What can be asked of a scene, and the answers."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

import numpy as np

from dalle_pytorch.scenes import world
from dalle_pytorch.scenes.captions import FAMILY, states_place, states_size
from dalle_pytorch.scenes.world import Scene

# What a subject can be painted in: one of the colours, its own, or a material.
PAINTS = (*world.COLOURS, world.NATURAL, *world.MATERIALS)
# Questions and possible answers. The first subject is the left or upper one.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "count": ("1", "2"),
    "background": world.BACKGROUNDS,
    "kind": world.SUBJECTS,
    "colour": PAINTS,
    "second_kind": world.SUBJECTS,
    "second_colour": PAINTS,
    "size": tuple(world.SIZES),
    "place": world.PLACES,
    "relation": world.RELATIONS,
}
# The groups that each kind belongs to: its family, and one half or the other of all kinds, which are halved at random
# so often that any two kinds are in different groups at least once, those of one family too.
HALVINGS = 12
_CODES = np.random.default_rng(0).integers(2, size=(len(world.SUBJECTS), HALVINGS))
GROUPS = {kind: (FAMILY[kind], *(f"half {i}{'ab'[bit]}" for i, bit in enumerate(code)))
          for kind, code in zip(world.SUBJECTS, _CODES, strict=True)}  # fmt: skip
# What the animal, the food, the digit, the one of a half is painted in. A caption that does not say where its subjects
# are tells this, and nothing of the first or the second one. Whoever knows it knows which paint belongs to which
# subject.
PAINT_QUESTIONS: dict[str, tuple[str, ...]] = dict.fromkeys(sorted({*chain(*GROUPS.values())}), PAINTS)
ALL_QUESTIONS = QUESTIONS | PAINT_QUESTIONS
OF_A_PLACE = ("kind", "colour", "second_kind", "second_colour", "relation")  # which of two subjects is where
NOT_ASKED = -100  # what cross_entropy leaves out


def answers(scene: Scene) -> dict[str, str]:
    """The true answers for a scene; questions that make no sense for it are left out."""
    first, *rest = scene.subjects
    facts = {"count": str(len(scene.subjects)), "background": scene.background, "kind": first.kind,
             "colour": first.colour}  # fmt: skip
    if rest and scene.relation:
        return facts | {"second_kind": rest[0].kind, "second_colour": rest[0].colour, "relation": scene.relation}
    return facts | {"size": first.size} | ({"place": scene.place} if scene.place else {})


def stated_answers(scene: Scene) -> dict[str, str]:
    """The answers without those that hang on a place or a size that the caption does not state."""
    facts = answers(scene)
    unstated = [] if states_size(scene) else ["size"]
    if not states_place(scene):
        unstated += OF_A_PLACE if scene.relation else ["place"]
    return {name: answer for name, answer in facts.items() if name not in unstated}


def paints(scene: Scene) -> dict[str, str]:
    """The true answers to `PAINT_QUESTIONS`, but for groups of which there are two in different paints."""
    pairs = {(group, subject.colour) for subject in scene.subjects for group in GROUPS[subject.kind]}
    paints_of_group = Counter(group for group, _ in pairs)
    return {group: paint for group, paint in pairs if paints_of_group[group] == 1}


def indices(facts: Mapping[str, str], questions: Mapping[str, tuple[str, ...]] = QUESTIONS) -> list[int]:
    """The index of the answer to each question, `NOT_ASKED` where there is none."""
    return [options.index(facts[name]) if name in facts else NOT_ASKED for name, options in questions.items()]


def attributes(scene: Scene) -> dict[str, list[int]]:
    """The answers to `ALL_QUESTIONS`, as the items of a data set have them: `attributes`, which the picture tells, and
    `caption_attributes`."""
    told, painted = {"attributes": answers(scene), "caption_attributes": stated_answers(scene)}, paints(scene)
    return {name: indices(found | painted, ALL_QUESTIONS) for name, found in told.items()}
