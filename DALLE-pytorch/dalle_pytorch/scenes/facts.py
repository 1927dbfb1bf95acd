"""What can be asked of a scene, and the answers."""

from dalle_pytorch.scenes import world
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
NOT_ASKED = -100  # what cross_entropy leaves out


def answers(scene: Scene) -> dict[str, str]:
    """The true answers for a scene; questions that make no sense for it are left out."""
    first, *rest = scene.subjects
    facts = {"count": str(len(scene.subjects)), "background": scene.background, "kind": first.kind,
             "colour": first.colour}  # fmt: skip
    if rest and scene.relation:
        return facts | {"second_kind": rest[0].kind, "second_colour": rest[0].colour, "relation": scene.relation}
    return facts | {"size": first.size} | ({"place": scene.place} if scene.place else {})


def indices(facts: dict[str, str], questions: dict[str, tuple[str, ...]] = QUESTIONS) -> list[int]:
    """The index of the answer to each question, `NOT_ASKED` where there is none."""
    return [options.index(facts[name]) if name in facts else NOT_ASKED for name, options in questions.items()]
