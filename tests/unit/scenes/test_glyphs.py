"""The drawn world: the same scene every time, at any resolution, with captions that are true."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.scenes.captions import states_place
from dalle_pytorch.scenes.dataset import GlyphsDataset
from dalle_pytorch.scenes.facts import (
    ALL_QUESTIONS,
    GROUPS,
    NOT_ASKED,
    PAINT_QUESTIONS,
    answers,
    paints,
    stated_answers,
)
from dalle_pytorch.scenes.twins import ONE, TWO, change_scene
from dalle_pytorch.scenes.world import Scene, Subject

# Every name of every kind of subject.
NAMES = {name: name for name in glyphs.world.SUBJECTS}
NAMES |= {str(i): name for i, name in enumerate(glyphs.world.DIGITS)}
NAMES |= {name[-1]: name for name in glyphs.world.LETTERS if name != "letter a"}


def test_scene_is_deterministic_by_index():
    first, again, other = glyphs.make_scene(7), glyphs.make_scene(7), glyphs.make_scene(8)
    assert first == again and first != other
    assert np.array_equal(glyphs.draw(first, 128), glyphs.draw(again, 128))


def test_splits_share_no_combination():
    seen = {split: set() for split in glyphs.world.SPLITS}
    for split in glyphs.world.SPLITS:
        for index in range(400):
            scene = glyphs.make_scene(index, split)
            combinations = {(s.kind, s.colour, scene.background) for s in scene.subjects}
            splits = {glyphs.split_of(*combination) for combination in combinations}
            assert split in splits and (split == "test" or "test" not in splits)
            assert split != "train" or splits == {"train"}
            seen[split] |= {combination for combination in combinations if glyphs.split_of(*combination) == split}
    assert all(seen.values()) and not seen["train"] & (seen["test"] | seen["validation"])


def test_captions_say_what_is_drawn():
    for index in range(300):
        scene = glyphs.make_scene(index, "validation")
        assert set(scene.caption.split()) <= glyphs.words()
        for subject in scene.subjects:
            said = [f" {subject.colour} {name} " for name in NAMES if NAMES[name] == subject.kind]
            assert any(phrase in f" {scene.caption} " for phrase in said), scene.caption


def test_captions_of_training_leave_something_open_now_and_then():
    left_open = {"colour": 0, "kind": 0, "background": 0}
    for index in range(1000):
        scene = glyphs.make_scene(index, num_subjects=1)
        (subject,), words = scene.subjects, scene.caption.split()
        assert set(words) <= glyphs.words()
        kind_is_open = any(f" {family} " in f"{scene.caption.replace('letter ' + subject.kind[-1], '')} "
                           for family in ("digit", "letter", "shape"))  # fmt: skip
        left_open["colour"] += subject.colour not in words
        left_open["kind"] += kind_is_open
        left_open["background"] += not any(
            phrase in scene.caption for phrase in glyphs.captions.ON_BACKGROUND[scene.background]
        )
        assert "shape" not in words or subject.kind in glyphs.world.SHAPES
        assert subject.colour in words or len(words) > 1
    pairs = [glyphs.make_scene(index, num_subjects=2) for index in range(1000)]
    left_open["relation"] = sum(not glyphs.states_place(scene) for scene in pairs)
    expected = glyphs.captions.LEFT_OPEN
    assert all(abs(count / 1000 - expected[fact]) < 0.04 for fact, count in left_open.items()), left_open


def test_unplaced_captions_do_not_say_which_is_where():
    together = set()
    for index in range(100):
        scene = glyphs.make_scene(index, num_subjects=2)
        unplaced = glyphs.with_unplaced_caption(scene, index)
        assert not states_place(unplaced) and replace(unplaced, caption=scene.caption) == scene
        together |= {word for word in ("and", "beside", "next to") if f" {word} " in unplaced.caption}
    assert together == {"and", "beside", "next to"}


def test_terse_captions_say_less():
    lengths = []
    for index in range(300):
        scene = glyphs.make_scene(index, "validation")
        terse = glyphs.with_terse_caption(scene, index)
        words = terse.caption.split()
        assert set(words) <= glyphs.words() and glyphs.change_caption(terse, index) != terse.caption
        background = next((p for p in glyphs.captions.ON_BACKGROUND[scene.background] if terse.caption.endswith(p)), "")
        of_subjects = terse.caption.removesuffix(background).split()
        assert {word for word in of_subjects if word in glyphs.world.COLOURS} <= {s.colour for s in scene.subjects}
        lengths.append((len(words), len(scene.caption.split())))
    short, long = np.mean(lengths, axis=0)
    assert short < 0.7 * long


def test_captions_do_without_articles_now_and_then():
    captions = [glyphs.make_scene(index).caption for index in range(1000)]
    bare = [caption for caption in captions if not {"a", "an"} & {*caption.split()[:1], *caption.split()[3:4]}]
    assert 50 < len(bare) < 150


def test_relation_in_caption_is_true():
    for index in range(200):
        scene = glyphs.make_scene(index, "validation", num_subjects=2)
        if not glyphs.states_place(scene):
            continue
        first, second = scene.subjects
        assert (first.column < second.column) if scene.relation == "left" else (first.row < second.row)
        named_first = scene.caption.index(first.colour) < scene.caption.index(second.colour)
        forward = any(f" {phrase} " in scene.caption for phrase in ("to the left of", "left of", "above", "over"))
        assert named_first == forward, scene.caption


def test_changed_caption_differs_in_one_fact():
    for index in range(200):
        scene = glyphs.make_scene(index)
        changed = glyphs.change_caption(scene, index)
        assert changed != scene.caption and set(changed.split()) <= glyphs.words()


def test_changed_captions_get_everything_wrong_that_can_be():
    """A scene of two subjects is described as one of one too; "black" is changed where it is said of a subject."""
    subjects = glyphs.Subject("star", "black", "small", 1, 5), glyphs.Subject("letter a", "red", "small", 9, 5)
    caption = "a black star left of a red letter a on black"
    scene = glyphs.Scene(subjects, "black", 0, 0, caption, relation="left")
    changed = {glyphs.change_caption(scene, seed) for seed in range(3000)}
    assert caption not in changed and changed >= {
        "a black star on black", "a red letter a on black", "a green star left of a red letter a on black",
        "a black star left of a green letter a on black", "a black star right of a red letter a on black",
        "a black star left of a red three on black", "a black star left of a red letter a on a brick wall",
    }  # fmt: skip
    assert not any("an on" in caption or "on red" in caption for caption in changed)
    subject = glyphs.Subject("letter a", "red", "big", 3, 3)
    changed = {glyphs.change_caption(glyphs.Scene((subject,), "black", 0, 0, "a red letter"), i) for i in range(300)}
    assert "an orange letter" in changed and "a orange letter" not in changed


def test_changed_captions_of_training_name_no_combination_of_other_splits():
    told = {phrase: name for name, phrases in glyphs.captions.ON_BACKGROUND.items() for phrase in phrases}
    named = 0
    for index in range(2000):
        changed = glyphs.change_caption(glyphs.make_scene(index), index)
        background = next((name for phrase, name in told.items() if changed.endswith(phrase)), None)
        for colour, kind in itertools.pairwise(changed.replace("letter ", "letter_").split()):
            kind = kind.replace("_", " ")
            if background and colour in glyphs.world.COLOURS and kind in NAMES:
                named += 1
                assert glyphs.split_of(NAMES[kind], colour, background) == "train", changed
    assert named > 1000


def two(first: str, second: str, caption: str) -> glyphs.Scene:
    subjects = [glyphs.Subject(*words.split(), "small", 1, 5) for words in (first, second)]
    return glyphs.Scene(tuple(subjects), "black", 0, 0, caption, relation="left")


def test_exchanged_colours_are_made_wrong_but_not_what_stays_true():
    def changed(scene):
        return {glyphs.change_caption(scene, seed) for seed in range(500)}

    scene = two("star orange", "seven black", "an orange star and a black 7 on a black background")
    assert "a black star and an orange 7 on a black background" in changed(scene)
    scene = two("two orange", "seven black", "an orange digit and a black digit")
    assert not changed(scene) & {"a black digit and an orange digit", scene.caption}


@pytest.mark.parametrize("background", glyphs.world.BACKGROUNDS)
def test_grain_is_only_in_the_large_picture(background):
    """The picture at 128 pixels is that at 256 with the grain averaged away: it is the same for any grain."""
    scenes = [glyphs.Scene((), background, 1, seed, "") for seed in (1, 2)]
    small = [glyphs.draw(scene, 128).astype(int) for scene in scenes]
    large = [glyphs.draw(scene, 256).astype(int) for scene in scenes]
    assert np.array_equal(*small)
    assert np.abs(large[0] - large[1]).mean() > 0.5
    halved = large[0].reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(halved - small[0]).mean() < 2


def seen_in(scene):
    """All that a twin may have otherwise: the background, and every subject's kind, colour, size and place."""
    return scene.background, [(s.kind, s.colour, s.size, s.column, s.row) for s in scene.subjects]


@pytest.mark.parametrize("terse", [False, True])
def test_twins_are_of_one_split_and_told_apart(terse):
    facts = set()
    for index in range(400):
        scene = glyphs.make_scene(index)
        first, second, fact = glyphs.make_twins(scene, index, terse)
        assert seen_in(first) == seen_in(scene) != seen_in(second) and first.caption != second.caption
        assert {first.variant, first.grain_seed} == {second.variant, second.grain_seed}
        assert all(glyphs.split_of(s.kind, s.colour, second.background) == "train" for s in second.subjects)
        assert {*first.caption.split(), *second.caption.split()} <= glyphs.words()
        assert glyphs.draw(second, 32).shape == (32, 32, 3)
        facts.add((len(first.subjects), fact))
        assert (len({s.kind for s in second.subjects}) < len(second.subjects)) == (fact == "doubled")
    assert facts == {(1, fact) for fact in ONE} | {(2, fact) for fact in TWO}
    assert glyphs.make_twins(scene, 399, terse) == (first, second, fact)


def test_twins_of_a_held_out_scene_are_found():
    for index in range(50):
        _, twin, _ = glyphs.make_twins(glyphs.make_scene(index, "validation"), index)
        assert any(glyphs.split_of(s.kind, s.colour, twin.background) == "validation" for s in twin.subjects)


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("kind", [("other", "red", "small", 1, 5), ("star", "blue", "small", 9, 5)]),
        ("colour", [("seven", "other", "small", 1, 5), ("star", "blue", "small", 9, 5)]),
        ("colours", [("seven", "blue", "small", 1, 5), ("star", "red", "small", 9, 5)]),
        ("places", [("star", "blue", "small", 1, 5), ("seven", "red", "small", 9, 5)]),
        ("doubled", [("seven", "red", "small", 1, 5), ("seven", "red", "small", 9, 5)]),
        ("left out", [("seven", "red", "small", 1, 5)]),
        ("background", [("seven", "red", "small", 1, 5), ("star", "blue", "small", 9, 5)]),
    ],
)
def test_a_changed_scene_has_one_fact_changed(fact, expected):
    subjects = (glyphs.Subject("seven", "red", "small", 1, 5), glyphs.Subject("star", "blue", "small", 9, 5))
    scene = glyphs.Scene(subjects, "brick", 0, 0, "", relation="left")
    # The lots, until they fall on the first of the two.
    for seed in range(20):
        changed = change_scene(scene, fact, np.random.default_rng(seed))
        background, now = seen_in(changed)
        now = [tuple("other" if part not in (*sum(expected, ()),) else part for part in subject) for subject in now]
        if now == expected:
            break
    assert now == expected
    assert (background == "brick") == (fact != "background")
    assert changed.place == ("left" if fact == "left out" else None)


def test_twins_exchange_no_places_that_the_caption_leaves_open():
    exchanged = 0
    for index in range(400):
        first, second, fact = glyphs.make_twins(glyphs.make_scene(index, num_subjects=2), index)
        if fact == "places":
            exchanged += 1
            assert glyphs.states_place(first) and glyphs.states_place(second)
    assert exchanged > 20


def test_mask_covers_the_subject():
    scene = glyphs.Scene((glyphs.Subject("square", "red", "big", 3, 3),), "white", 0, 0, "")
    mask = glyphs.subject_mask(scene)
    assert mask.shape == (16, 16) and mask[8, 8] == 1 and mask[0, 0] == 0 and mask[:, :2].sum() == 0


def test_write_folder_tells_the_facts_too(tmp_path):
    glyphs.write_folder(tmp_path, 3, resolution=64)
    facts = json.loads((tmp_path / "000001.json").read_text())
    assert facts["background"] == glyphs.make_scene(1).background


def test_dataset_items_have_one_shape():
    item = GlyphsDataset(128)[5]
    assert item["image"].shape == (3, 128, 128) and item["image"].dtype == torch.uint8
    assert item["caption"] == glyphs.make_scene(5).caption


def test_captions_are_terse_as_often_as_wanted():
    plain, terse = GlyphsDataset(32), GlyphsDataset(32, terse_every=2, wrong_captions=4)
    same = [plain[i]["caption"] == terse[i]["caption"] for i in range(20)]
    assert all(same[1::2]) and sum(same[::2]) < 3
    assert all(len(set(terse[i]["negative_captions"]) - {terse[i]["caption"]}) > 1 for i in range(20))


def test_items_have_twins_when_wanted():
    item = GlyphsDataset(32, terse_every=2, wrong_captions=2, twins=True)[4]
    assert item["image"].shape == item["second_image"].shape and not item["image"].equal(item["second_image"])
    assert item["caption"] != item["second_caption"]
    assert len(item["negative_captions"]) == len(item["second_negative_captions"]) == 2


def test_twins_with_exchanged_colours_are_not_told_apart_by_their_places():
    facts = []
    for index in range(60):
        scene = glyphs.make_scene(index, num_subjects=2, of="painted")
        first, second, fact = glyphs.make_twins(scene, index, exchanged=True)
        facts.append(fact)
        assert not states_place(first) and not states_place(second)
        if fact == "colours":
            assert [subject.colour for subject in first.subjects] == [s.colour for s in second.subjects][::-1]
    assert facts.count("colours") > 15 and set(facts) == {"colours", "doubled"}


def test_every_so_many_th_item_is_a_pair_with_exchanged_colours():
    data = GlyphsDataset(32, of="painted", twins=True, exchanged_every=2, facts=True)
    count = list(ALL_QUESTIONS).index("count")
    for index in range(0, 12, 2):
        _, second, fact = glyphs.make_twins(glyphs.make_scene(index, "train", 2, "painted"), index, exchanged=True)
        item = data[index]
        assert item["second_caption"] == second.caption and item["attributes"][count] == 1
        assert fact == "doubled" or not item["attributes"].equal(item["second_attributes"])
    plain = GlyphsDataset(32, of="painted", twins=True)
    assert [data[i]["caption"] for i in (1, 3, 5)] == [plain[i]["caption"] for i in (1, 3, 5)]
    # Without twins there is nothing to exchange.
    alone = GlyphsDataset(32, of="painted", exchanged_every=2)
    assert [alone[i]["caption"] for i in range(4)] == [glyphs.make_scene(i, of="painted").caption for i in range(4)]


def test_items_have_facts_when_wanted():
    data, plain = GlyphsDataset(32, of="everything", facts=True), GlyphsDataset(32)
    assert "attributes" not in plain[0] and plain.attributes == ()
    assert data.attributes == tuple(len(options) for options in ALL_QUESTIONS.values())
    for index in range(30):
        scene, item = glyphs.make_scene(index, of="everything"), data[index]
        said, told = (
            {name: ALL_QUESTIONS[name][at] for name, at in zip(ALL_QUESTIONS, item[key].tolist(), strict=True)
             if at != NOT_ASKED}
            for key in ("attributes", "caption_attributes")
        )  # fmt: skip
        assert said == answers(scene) | paints(scene) and told == stated_answers(scene) | paints(scene)
        assert said["background"] == scene.background and said["count"] == str(len(scene.subjects))
        kinds = [said["kind"], said.get("second_kind")]
        assert kinds == [*[subject.kind for subject in scene.subjects], None][:2]
        assert said.get("place") == scene.place and said.get("relation") == scene.relation
        assert ("size" in said) == (len(scene.subjects) == 1)


def test_groups_tell_any_two_kinds_apart():
    assert set(itertools.chain(*GROUPS.values())) == set(PAINT_QUESTIONS)
    for first, second in itertools.combinations(glyphs.world.SUBJECTS, 2):
        assert GROUPS[first] != GROUPS[second]
    cat, dog = Subject("cat", "natural", "small", 0, 4), Subject("dog", "red", "small", 8, 4)
    scene = Scene((cat, dog), "brick", 0, 0, "a cat next to a red dog on brick", relation="left")
    answered = paints(scene)
    assert answered == paints(replace(scene, subjects=(dog, cat)))
    for subject in scene.subjects:
        told = {answered[group] for group in GROUPS[subject.kind] if group in answered}
        assert told == {subject.colour}


def test_captions_tell_no_more_than_they_state():
    cat, seven = Subject("cat", "natural", "small", 0, 4), Subject("seven", "red", "small", 8, 4)
    scene = Scene((cat, seven), "brick", 0, 0, "a cat next to a red seven on brick", relation="left")
    unplaced = {"count": "2", "background": "brick"}
    painted = paints(scene)
    assert stated_answers(scene) == unplaced and (painted["animal"], painted["digit"]) == ("natural", "red")
    scene = replace(scene, caption="a cat left of a red seven on brick")
    assert stated_answers(scene) == answers(scene) and answers(scene)["second_colour"] == "red"
    dog = replace(seven, kind="dog")
    assert "animal" not in paints(replace(scene, subjects=(cat, dog)))
    assert paints(replace(scene, subjects=(cat, replace(dog, colour="natural"))))["animal"] == "natural"
    one = {"count": "1", "background": "brick", "kind": "cat", "colour": "natural"}
    scene = Scene((cat,), "brick", 0, 0, "a cat on brick", place="left")
    assert stated_answers(scene) == one
    assert stated_answers(replace(scene, caption="a small cat on brick")) == one | {"size": "small"}
    assert stated_answers(replace(scene, caption="a cat on the left on brick")) == one | {"place": "left"}
    assert stated_answers(replace(scene, place=None)) == one
