"""Things beside glyphs: what they are called, what colours they have, and how they are drawn."""

import numpy as np
import pytest

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.errors import UsageError
from dalle_pytorch.scenes.captions import MADE_OF, NAMES
from dalle_pytorch.scenes.scenes import MIXTURES
from dalle_pytorch.scenes.sprites import COLUMNS, _sheet, dilate, recoloured, sprite
from dalle_pytorch.scenes.subjects import subject_layers
from dalle_pytorch.scenes.things import NATURAL_COLOURS, THINGS, WITHOUT_ARTICLE
from dalle_pytorch.scenes.world import COLOURS, MATERIALS, NATURAL, SIZES, can_have


def scene(kind, colour, background="white", size="big"):
    corner = (16 - SIZES[size]) // 2
    return glyphs.Scene((glyphs.Subject(kind, colour, size, corner, corner),), background, 0, 0, "")


def test_every_thing_has_a_sprite_and_a_name_of_its_own():
    assert len(THINGS) >= 100 and not {*THINGS} & {*glyphs.world.GLYPHS}
    assert _sheet().size == (COLUMNS * 128, -(-len(THINGS) // COLUMNS) * 128)
    names = [name for kind in THINGS for name in NAMES[kind]]
    assert len(names) == len({*names})
    assert {*NATURAL_COLOURS} | WITHOUT_ARTICLE <= {*THINGS} and all(
        colour in COLOURS for colours in NATURAL_COLOURS.values() for colour in colours
    )
    for kind in THINGS:
        alpha = sprite(kind, 6, 8)[..., 3]
        assert alpha.max() == 1 and alpha[:8].max() == alpha[:, -8:].max() == 0  # a margin of one cell
        rows, columns = np.nonzero(alpha > 0.5)
        assert max(np.ptp(rows), np.ptp(columns)) >= 40, kind  # it fills its box one way or the other


def test_things_differ_at_48_pixels():
    """Where either of two covers a pixel they differ by 30 grey levels on average, on a grey ground."""
    sprites = np.stack([sprite(kind, 6, 8) for kind in THINGS]).astype(np.float32)
    alpha = sprites[..., 3:]
    pictures = sprites[..., :3] * alpha + 128 * (1 - alpha)
    for i, kind in enumerate(THINGS):
        covered = np.maximum(alpha[i], alpha[i + 1 :])
        difference = (np.abs(pictures[i] - pictures[i + 1 :]) * covered).mean(-1).sum((1, 2)) / covered.sum((1, 2, 3))
        assert (difference > 30).all(), (kind, list(THINGS)[i + 1 + int(difference.argmin())], difference.min())


def test_dilation_covers_a_disc():
    alpha = np.zeros((15, 15), np.float32)
    alpha[7, 7] = 1
    covered = dilate(alpha, 3)
    y, x = np.mgrid[:15, :15] - 7
    assert (covered[np.hypot(y, x) <= 2.5] == 1).all() and not covered[np.hypot(y, x) >= 3.5].any()
    assert covered[7, 10] == 0.5


def test_a_recoloured_thing_keeps_its_shading():
    """The median takes the colour itself; what is darker becomes darker and what is lighter lighter."""
    picture, red = sprite("cat", 10, 8), np.array(COLOURS["red"], np.float32)
    inside = picture[..., 3] > 0.99
    luma = picture[inside][:, :3] @ np.array((0.299, 0.587, 0.114))
    out = recoloured("cat", 10, 8, red)[inside]
    middle = np.abs(luma - np.median(luma)) < 0.5
    assert np.abs(out[middle] - red).max() < 4
    darkest, lightest = luma <= np.percentile(luma, 2), luma >= np.percentile(luma, 99)
    assert out[darkest].mean() < 0.5 * red.mean() and out[lightest].mean() > red.mean()
    assert (out[:, 0] >= out[:, 1]).all() and (out[:, 0] >= out[:, 2]).all()


def test_a_thing_is_the_same_wherever_it_stands():
    """On the grid, so that its tokens are the same; its own colours are those of the sprite."""
    subject = glyphs.Subject("owl", NATURAL, "small", 1, 5)
    moved = glyphs.Subject("owl", NATURAL, "small", 9, 5)
    first, second = (glyphs.draw(glyphs.Scene((each,), "white", 0, 0, ""), 128) for each in (subject, moved))
    assert np.array_equal(first[32:96, 0:64], second[32:96, 64:128])
    picture = sprite("owl", 6, 8)
    inside = picture[..., 3] == 1
    assert np.abs(first[32:96, 0:64][inside].astype(float) - picture[inside][:, :3]).max() <= 1


def test_what_is_made_of_a_material_shows_it_within_its_outline():
    red, brick = (glyphs.draw(scene("star", colour), 128).astype(float) for colour in ("red", "brick"))
    mask = np.kron(glyphs.subject_mask(scene("star", "red")), np.ones((8, 8)))
    assert np.array_equal(red[mask == 0], brick[mask == 0]) and np.abs(red - brick)[mask == 1].mean() > 20
    wall = glyphs.draw(glyphs.Scene((), "brick", 0, 0, ""), 128)[:96, :96].astype(float)
    # The star's layers begin one cell outside its box, at (16, 16).
    expected = wall * subject_layers("star", 10, 8).light[..., None]
    assert np.abs(brick[56:72, 56:72] - expected[40:56, 40:56]).max() <= 1


@pytest.mark.parametrize("of", [name for name in MIXTURES if name != "glyphs"])
def test_captions_of_things_are_true(of):
    seen = set()
    for index in range(300):
        found = glyphs.make_scene(index, "validation", of=of)
        assert {*found.caption.split()} <= glyphs.words(MIXTURES[of].kinds)
        said = f" {found.caption} "
        for subject in found.subjects:
            assert subject.colour not in NATURAL_COLOURS.get(subject.kind, ())
            assert subject.colour != NATURAL or subject.kind in THINGS
            names = [name for name in NAMES[subject.kind] if f" {name} " in said]
            assert names, found.caption
            if subject.colour in MATERIALS:
                assert any(f"{name} {of_} {subject.colour} " in said for name in names for of_ in MADE_OF)
            elif subject.colour == NATURAL:
                colours = {colour for colour in COLOURS for name in names if f" {colour} {name} " in said}
                assert not colours - {NATURAL_COLOURS.get(subject.kind, ("",))[0]}, found.caption
            else:
                assert any(f" {subject.colour} {name} " in said for name in names)
            if subject.kind in WITHOUT_ARTICLE:
                assert f" a {subject.kind} " not in said
            seen.add("natural" if subject.colour == NATURAL else "made" if subject.colour in MATERIALS else "colour")
    assert seen == {"things": {"natural"}, "recoloured": {"colour"}, "made": {"made"}}.get(
        of, {"natural", "made", "colour"}
    )


def test_mixtures_have_the_shares_that_they_name():
    subjects = [subject for index in range(1500) for subject in glyphs.make_scene(index, of="everything").subjects]
    mixture, things = MIXTURES["everything"], [subject for subject in subjects if subject.kind in THINGS]
    assert abs(len(things) / len(subjects) - mixture.things) < 0.03
    assert abs(np.mean([subject.colour in MATERIALS for subject in subjects]) - mixture.made) < 0.03
    natural = np.mean([subject.colour == NATURAL for subject in things])
    assert abs(natural - (1 - mixture.made) * mixture.natural) < 0.04
    with pytest.raises(UsageError, match=r"expected scenes of glyphs, things, .*got 'cats'"):
        glyphs.make_scene(0, of="cats")


def test_wrong_captions_and_twins_of_things_are_possible():
    changed = {"made of": 0, "colour": 0}
    for index in range(300):
        first = glyphs.make_scene(index, of="everything")
        caption = glyphs.change_caption(first, index)
        assert caption != first.caption and {*caption.split()} <= glyphs.words(glyphs.world.SUBJECTS)
        changed["made of"] += any(f"of {material}" in caption for material in MATERIALS)
        here, twin, fact = glyphs.make_twins(first, index)
        assert all(can_have(subject.kind, subject.colour) for subject in twin.subjects)
        assert here.caption != twin.caption
        changed["colour"] += fact == "colour"
    assert all(changed.values())
