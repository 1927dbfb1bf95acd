"""What is said of a scene: complete and terse captions, and such with one fact made wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from dalle_pytorch.scenes import world
from dalle_pytorch.scenes.things import NATURAL_COLOURS, THINGS, WITHOUT_ARTICLE
from dalle_pytorch.scenes.world import NATURAL, Scene, Subject, can_have, split_of, split_of_scene

# How often a caption does without a fact, or a word: in a complete one, in one of training, in a terse one.
COMPLETE = {"colour": 0.0, "kind": 0.0, "background": 0.0, "place": 0.5, "size": 0.5, "relation": 0.1, "frame": 0.75,
            "article": 0.1}  # fmt: skip
# Two subjects of which is not said which is where are the hardest to draw, each once: training has more of them.
LEFT_OPEN = COMPLETE | {"colour": 0.15, "kind": 0.1, "background": 0.2, "relation": 0.25}
UNPLACED = LEFT_OPEN | {"relation": 1.0}
TERSE = {"colour": 0.75, "kind": 0.1, "background": 0.85, "place": 0.9, "size": 0.9, "relation": 0.25, "frame": 1.0,
         "article": 0.2}  # fmt: skip

# The tables are indexed with a Scene's background, place and relation, which may be None.
ON_BACKGROUND: dict[str | None, tuple[str, ...]] = {
    "white": ("on white", "on a white background"), "black": ("on black", "on a black background"),
    "brick": ("on brick", "on a brick wall"), "wood": ("on wood", "on a wooden floor"),
    "water": ("on water", "on the water"), "lego": ("on lego", "on a lego board"),
    "checks": ("on checks", "on a checkered background"), "stripes": ("on stripes", "on a striped background"),
    "dots": ("on dots", "on polka dots"), "tiles": ("on tiles", "on a tiled wall"),
    "grass": ("on grass", "on the lawn"), "sand": ("on sand", "on the beach"),
    "marble": ("on marble", "on a marble floor"), "plaid": ("on plaid", "on a plaid blanket"),
    "zigzags": ("on zigzags", "on a zigzag pattern"), "night": ("on a night sky", "on a starry sky"),
}  # fmt: skip
AT_PLACE: dict[str | None, tuple[str, ...]] = {
    "middle": ("in the middle", "in the center"), "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"), "top": ("at the top",), "bottom": ("at the bottom",),
    **{corner: (f"in the {corner} corner",) for corner in world.PLACES if " " in corner},
}  # fmt: skip
SIZE_NAMES = {"big": ("big", "large"), "small": ("small", "little")}
RELATED: dict[str | None, tuple[str, ...]] = {"left": ("to the left of", "left of"), "above": ("above", "over")}
REVERSED: dict[str | None, tuple[str, ...]] = {"left": ("to the right of", "right of"), "above": ("below", "under")}
# Which is where is left open.
TOGETHER: dict[str | None, tuple[str, ...]] = {"left": ("and", "next to", "beside"), "above": ("and",)}
NAMES = {kind: (kind,) for kind in world.SUBJECTS} | {kind: (kind, str(i)) for i, kind in enumerate(world.DIGITS)}
NAMES |= {kind: (kind, kind[-1]) for kind in world.LETTERS if kind != "letter a"}  # "a" alone is the article
NAMES |= {kind: (kind, thing.other) for kind, thing in THINGS.items() if thing.other}
MADE_OF = ("made of", "made out of")
CALLED_BY_NATURE = 0.2  # how often a thing as it is is said to be of its natural colour
# For a caption that names no kind.
FAMILY = dict.fromkeys(world.DIGITS, "digit") | dict.fromkeys(world.LETTERS, "letter")
FAMILY |= dict.fromkeys(world.SHAPES, "shape") | {kind: thing.family for kind, thing in THINGS.items()}


def write_caption(rng: np.random.Generator, subjects: tuple[Subject, ...], background: str, place: str | None,
                  relation: str | None, left_open: Mapping[str, float]) -> str:  # fmt: skip
    def leaves_open(fact: str) -> bool:
        return rng.random() < left_open[fact]

    without_article = leaves_open("article")

    def name(subject: Subject, with_size: bool) -> str:
        colour, material, (kind, *others) = subject.colour, "", NAMES[subject.kind]
        if others and rng.random() < 0.25:
            kind = str(rng.choice(others))
        # A thing of which no colour is said is as it is by nature.
        if leaves_open("colour") and (subject.kind not in THINGS or colour == NATURAL):
            colour = ""
        elif leaves_open("kind"):
            kind = FAMILY[subject.kind]
        if colour in world.MATERIALS:
            colour, material = "", f"{rng.choice(MADE_OF)} {colour}"
        elif colour == NATURAL:
            by_nature = NATURAL_COLOURS.get(subject.kind, ("",))[0]
            colour = by_nature if rng.random() < CALLED_BY_NATURE else ""
        size = str(rng.choice(SIZE_NAMES[subject.size])) if with_size else ""
        words = " ".join(filter(None, (size, colour, kind, material)))
        return words if without_article or kind in WITHOUT_ARTICLE else f"{_article(words)} {words}"

    on = "" if leaves_open("background") else str(rng.choice(ON_BACKGROUND[background]))
    if len(subjects) == 1:
        what = name(subjects[0], with_size=not leaves_open("size"))
        if not leaves_open("place"):
            what += f" {rng.choice(AT_PLACE[place])}"
    else:
        first, second = (name(subject, with_size=False) for subject in subjects)
        roll, said = rng.random(), 1 - left_open["relation"]
        if roll < said / 2:
            what = f"{first} {rng.choice(RELATED[relation])} {second}"
        elif roll < said:
            what = f"{second} {rng.choice(REVERSED[relation])} {first}"
        else:
            together = rng.choice(TOGETHER[relation])
            what = f" {together} ".join([first, second] if rng.random() < 0.5 else [second, first])
    caption = f"{what} {on}".rstrip()
    if not leaves_open("frame"):
        caption = f"a {rng.choice(['picture', 'drawing', 'photo'])} of {caption}"
    return caption


def with_terse_caption(scene: Scene, seed: int = 0) -> Scene:
    """The scene with a caption that says little of it, often no more than "a seven"."""
    return with_caption(scene, np.random.default_rng([len(world.SPLITS) + 1, seed]), TERSE)


def with_unplaced_caption(scene: Scene, seed: int = 0) -> Scene:
    """The scene with a caption that does not say which of two subjects is where."""
    return with_caption(scene, np.random.default_rng([len(world.SPLITS) + 3, seed]), UNPLACED)


def with_caption(scene: Scene, rng: np.random.Generator, left_open: Mapping[str, float]) -> Scene:
    caption = write_caption(rng, scene.subjects, scene.background, scene.place, scene.relation, left_open)
    return replace(scene, caption=caption)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" and not words.startswith(("unicorn", "ufo", "one")) else "a"


def states_place(scene: Scene) -> bool:
    """Whether the caption says where the subject is, or which of two is where."""
    tables = (RELATED, REVERSED) if scene.relation else (AT_PLACE,)
    phrases = [phrase for table in tables for phrase in table.get(scene.relation or scene.place, ())]
    return any(f" {phrase} " in f"{scene.caption} " for phrase in phrases)


def names_subjects_apart(scene: Scene) -> bool:
    """Whether the caption says which of two subjects is which: "a red digit and a blue digit" does not."""
    first, second = scene.subjects
    said = f" {scene.caption} "
    named = any(f" {name} " in said for subject in scene.subjects for name in NAMES[subject.kind])
    return named or FAMILY[first.kind] != FAMILY[second.kind]


def states_size(scene: Scene) -> bool:
    """Whether the caption says how big the subject is."""
    return any(f" {name} " in f" {scene.caption} " for names in SIZE_NAMES.values() for name in names)


def change_caption(scene: Scene, seed: int = 0) -> str:
    """The caption with one fact made wrong: a subject, colour, size, place or background; of two subjects also which is
    where, which has which colour, or that there are two.

    Hard negatives for CLIP. Only what the caption says can be made wrong. Of a training scene no combination of another
    split comes out: CLIP would learn that it is never true.
    """
    rng = np.random.default_rng([len(world.SPLITS), seed])
    caption = f" {scene.caption} "
    held = {value for subject in scene.subjects for value in (subject.kind, subject.colour)}
    background, split = scene.background, split_of_scene(scene.subjects, scene.background)
    wrong: list[list[str]] = []  # of every fact that is said, the captions that have it wrong

    def allowed(kind: str, colour: str, background: str) -> bool:
        return can_have(kind, colour) and (split != "train" or split_of(kind, colour, background) == "train")

    def in_place_of(phrases: Iterable[str], others: Iterable[str]) -> list[str]:
        phrase = next((phrase for phrase in phrases if f" {phrase} " in caption), None)
        return [caption.replace(f" {phrase} ", f" {other} ").strip() for other in others] if phrase else []

    def exchanged_colours() -> list[str]:
        first, second = scene.subjects
        pairs = ((first.kind, second.colour), (second.kind, first.colour))
        # Where the subjects are not told apart, it would still be true.
        if (
            not {first.colour, second.colour} <= {*world.COLOURS}
            or not names_subjects_apart(scene)
            or not all(allowed(*pair, scene.background) for pair in pairs)
        ):
            return []
        exchange = {first.colour: second.colour, second.colour: first.colour}
        on = _background_said(scene)
        said = scene.caption.removesuffix(on).split()
        out = [exchange.get(word, word) for word in said]
        return [" ".join(out) + on] if out != said else []

    for subject in scene.subjects:
        kinds = [kind for kind in alike(subject.kind) if kind not in held and allowed(kind, subject.colour, background)]
        colours = [name for name in world.COLOURS if name not in held and allowed(subject.kind, name, background)]
        # As likely as four other facts: what the subject is, is the hardest to see.
        wrong += [in_place_of(NAMES[subject.kind], [name for other in kinds for name in NAMES[other]])] * 4
        # With its subject, for "black" may be said of the background too.
        for name in (*NAMES[subject.kind], FAMILY[subject.kind]):
            wrong.append(in_place_of([f"{subject.colour} {name}"], [f"{colour} {name}" for colour in colours]))
        if not any(f" {name} " in caption for name in NAMES[subject.kind]):  # said by its family
            families = {FAMILY[kind] for kind in alike(subject.kind)} - {FAMILY[each.kind] for each in scene.subjects}
            wrong.append(in_place_of([FAMILY[subject.kind]], sorted(families)))
        if subject.colour == NATURAL:
            for name in NAMES[subject.kind]:
                wrong.append(in_place_of([name], [f"{colour} {name}" for colour in colours]))
        if subject.colour in world.MATERIALS:
            others = [name for name in world.MATERIALS if name not in held]
            wrong += [in_place_of([f"{of} {subject.colour}"], [f"{of} {name}" for name in others]) for of in MADE_OF]
        wrong.append(in_place_of(SIZE_NAMES[subject.size], [name for size in world.SIZES if size != subject.size
                                                             for name in SIZE_NAMES[size]]))  # fmt: skip
    backgrounds = [name for name in world.BACKGROUNDS
                   if all(allowed(subject.kind, subject.colour, name) for subject in scene.subjects)]  # fmt: skip
    for table, true, possible in ((ON_BACKGROUND, background, backgrounds), (AT_PLACE, scene.place, world.PLACES)):
        wrong.append(in_place_of(table.get(true, ()), [other for name in possible if name != true
                                                       for other in table[name]]))  # fmt: skip
    if scene.relation:
        for said, opposite in ((RELATED, REVERSED), (REVERSED, RELATED)):
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


def alike(kind: str) -> list[str]:
    """The kinds that can stand in a caption where this one does: glyphs for glyphs, things for things, with an article
    or all without."""
    if kind not in THINGS:
        return [*world.GLYPHS]
    return [other for other in THINGS if (other in WITHOUT_ARTICLE) == (kind in WITHOUT_ARTICLE)]


def _without_a_subject(scene: Scene) -> list[str]:
    """The two captions that a scene of two subjects would have if one of them were all there is."""
    said = (*RELATED[scene.relation], *REVERSED[scene.relation], *TOGETHER[scene.relation])
    first, _, second = next(parts for phrase in said if (parts := scene.caption.partition(f" {phrase} "))[1])
    return [first + _background_said(scene), second]


def _background_said(scene: Scene) -> str:
    """What the caption says of the background, at its end: " on sand", or nothing."""
    phrases = (f" {phrase}" for phrase in ON_BACKGROUND[scene.background])
    return next((phrase for phrase in phrases if scene.caption.endswith(phrase)), "")


def words(kinds: Iterable[str] = world.GLYPHS) -> frozenset[str]:
    """Every word that a caption of these kinds can hold. The default model has seen those of glyphs."""
    kinds = [*kinds]
    tables = (ON_BACKGROUND, AT_PLACE, SIZE_NAMES, RELATED, REVERSED, TOGETHER)
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [name for kind in kinds for name in (*NAMES[kind], FAMILY[kind])]
    phrases += [*world.COLOURS, "a an of picture drawing photo"]
    if any(kind in THINGS for kind in kinds):
        phrases += [*MADE_OF, *world.MATERIALS]
    return frozenset(" ".join(phrases).split())
