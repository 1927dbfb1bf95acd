"""What a visitor may ask for, why the rest is refused, and the file of settings."""

import json
from dataclasses import replace

import pytest

from dalle_pytorch.errors import FileError
from text_to_image.web.forms import LONGEST_PROMPT, Diffusion, Generation, Limits, Saved, read_settings

LIMITS = Limits(max_images=8, max_picks=2, max_steps=50, max_size=512)


@pytest.mark.parametrize("field, value, said", [
    ("prompt", " \n", "say in a few words"),
    ("prompt", "a" * (LONGEST_PROMPT + 1), "at most 2000 characters"),
    ("prompt", 7, "is text"),
    ("prompt", "a \ud800", "is text"),
    ("num_images", 0, "1 or more"),
    ("num_images", 9, "this page allows at most 8, got 9"),
    ("num_images", 2.5, "whole number"),
    ("num_images", None, "whole number"),
    ("temperature", -1, "0 or more"),
    ("temperature", "hot", "a number"),
    ("top_p", 0, "above 0"),
    ("top_p", 1.1, "at most 1"),
    ("cond_scale", float("nan"), "a number"),
    ("seed", -1, "0 or more"),
    ("seed", 2**32, "at most 4294967295"),
    ("rows", 0, "1 or more"),
])  # fmt: skip
def test_candidates_that_are_refused(field, value, said):
    refusals = Generation(**{"prompt": "a red seven", field: value}).refusals(LIMITS)
    assert refusals.keys() == {field} and said in refusals[field]


@pytest.mark.parametrize("field, value, said", [
    ("picks", [], "pick at least one"),
    ("picks", [0, 1, 2], "this page allows at most 2, got 3"),
    ("picks", ["x"], "whole number"),
    ("picks", [-1], "0 or more"),
    ("clip_guidance", "perhaps", "True or False"),
    ("steps", 0, "1 or more"),
    ("steps", 51, "this page allows at most 50"),
    ("size", 63, "64 or more"),
    ("size", 513, "this page allows at most 512"),
])  # fmt: skip
def test_diffusion_that_is_refused(field, value, said):
    refusals = Diffusion(**{"picks": [0], field: value}).refusals(LIMITS)
    assert refusals.keys() == {field} and said in refusals[field]


def test_what_is_within_the_limits_is_served():
    assert Generation("a red seven", 8, 0, 1, 0, 2**32 - 1, 1).refusals(LIMITS) == {}
    assert Diffusion([5, 0], True, 50, 512).refusals(LIMITS) == {} and Diffusion([0]).refusals(LIMITS) == {}
    several = Generation("", 99, -1).refusals(LIMITS)
    assert several.keys() == {"prompt", "num_images", "temperature"}


SAVED = Saved(Generation("a жук", 4, 0.5, 0.9, 2, 7, 3), Diffusion([2, 0], True, 9, 128), [1, 2, 3], {"prior": "ab"})


def test_a_file_of_settings_is_read_as_it_was_written(tmp_path):
    (tmp_path / "settings.json").write_text(SAVED.to_json(), "utf-8")
    assert read_settings(tmp_path / "settings.json", 32, 256) == SAVED
    (tmp_path / "settings.json").write_text('{"prompt": "a red seven", "of": "another version"}')
    assert read_settings(tmp_path / "settings.json", 32, 256).generation == Generation("a red seven")


def test_settings_of_loaded_tokens_do_not_say_how_they_were_sampled():
    saved = replace(SAVED, init_image_tokens=None, loaded=True)
    assert json.loads(saved.to_json()) == {
        "prompt": "a жук", "seed": 7, "picks": [2, 0], "clip_guidance": True, "steps": 9, "size": 128,
        "models": {"prior": "ab"}, "init_image_tokens": None,
    }  # fmt: skip


@pytest.mark.parametrize("change, said", [
    ({"num_images": "many"}, "num_images: expected a whole number"),
    ({"seed": [1]}, "seed"),
    ({"top_p": 4}, "top_p"),
    ({"picks": [{}]}, "picks"),
    ({"prompt": ""}, "prompt"),
    ({"init_image_tokens": [1, 32]}, "tokens below 32"),
    ({"init_image_tokens": [True]}, "tokens below 32"),
    ({"init_image_tokens": [1] * 256}, "less than 256 tokens"),
    ({"init_image_tokens": []}, "less than 256 tokens"),
    ({"init_image_tokens": "12"}, "less than 256 tokens"),
    ({"models": ["ab"]}, "models"),
])  # fmt: skip
def test_settings_that_no_request_has(tmp_path, change, said):
    (tmp_path / "settings.json").write_text(json.dumps({**json.loads(SAVED.to_json()), **change}))
    with pytest.raises(FileError, match=said) as raised:
        read_settings(tmp_path / "settings.json", 32, 256)
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"[]", b'{"a": 1}', b"[" * 100_000, b'{"prompt": 1e999}',
                                     b'"prompt"', b'{"prompt": null}'])  # fmt: skip
def test_files_that_hold_no_settings(tmp_path, content):
    (tmp_path / "upload").write_bytes(content)
    with pytest.raises(FileError, match=r"holds no settings of this page|is not a text") as raised:
        read_settings(tmp_path / "upload", 32, 256)
    assert len(str(raised.value)) <= 300
