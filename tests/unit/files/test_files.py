"""Pictures, tokens and native folders on disk: whole or not at all, and nothing unpickled."""

import errno
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_pytorch.errors import CheckpointError, FileError
from dalle_pytorch.files import atomic, images
from dalle_pytorch.files import tokens as token_files
from dalle_pytorch.files.atomic import atomic_write
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.vae.vqgan import VQGanVAE


class Danger:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("/tmp/unpickled-by-a-test"),)


def write_tokens(path, array, **kwargs):
    np.save(path, array, **kwargs)
    return path


def test_tokens_round_trip(tmp_path):
    tokens = torch.arange(256)
    token_files.save_tokens(tmp_path / "0.npy", tokens)
    assert np.load(tmp_path / "0.npy").dtype == np.int64
    assert torch.equal(token_files.load_tokens(tmp_path / "0.npy", num_tokens=256, seq_len=256), tokens)


@pytest.mark.parametrize("shape", [(256,), (16, 16), (1, 256), (1, 16, 16)])
def test_tokens_of_other_tools_are_flattened(tmp_path, shape):
    path = write_tokens(tmp_path / "0.npy", np.arange(256, dtype=np.int32).reshape(shape))
    assert torch.equal(token_files.load_tokens(path, 512), torch.arange(256))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(256, 512), "expected tokens from 0 to 511, got 512"),
        (np.full(256, -1), "got -1"),
        (np.zeros(256), "float64"),
        (np.zeros(255, int), "shape"),
        (np.zeros((64, 4), int), "shape"),
        (np.zeros(0, int), "shape"),
        (np.zeros(64, int), "expected 256 tokens, got 64"),
        (np.array([Danger()] * 256), "Python objects"),
    ],
)
def test_bad_tokens_are_refused(tmp_path, array, message):
    path = write_tokens(tmp_path / "bad.npy", array, allow_pickle=array.dtype == object)
    with pytest.raises(FileError, match=message):
        token_files.load_tokens(path, 512, 256)
    import os

    assert not os.path.exists("/tmp/unpickled-by-a-test")


def test_truncated_and_pickled_token_files_are_refused(tmp_path):
    whole = write_tokens(tmp_path / "whole.npy", np.zeros(256, int)).read_bytes()
    for name, data in {"cut": whole[:-9], "header": whole[:20], "empty": b"", "pickle": pickle.dumps(Danger())}.items():
        (tmp_path / f"{name}.npy").write_bytes(data)
        with pytest.raises(FileError):
            token_files.load_tokens(tmp_path / f"{name}.npy", 512)
    with pytest.raises(FileError, match="is missing"):
        token_files.load_tokens(tmp_path / "missing.npy", 512)
    # A header that claims 10^10 tokens is compared with the file before memory is taken.
    header = whole[:128].replace(b"(256,), }" + b" " * 10, b"(10000000000,), }" + b" " * 2)
    assert len(header) == 128
    (tmp_path / "huge.npy").write_bytes(header + whole[128:])
    with pytest.raises(FileError, match=r"huge\.npy is not a usable token file: mmap length"):
        token_files.load_tokens(tmp_path / "huge.npy", 512)


def test_images_round_trip(tmp_path):
    image = torch.randint(0, 256, (3, 16, 16)).float() / 255
    images.save_image(tmp_path / "a.png", image)
    assert torch.equal(images.image_to_tensor(images.read_image(tmp_path / "a.png"))[0], image)


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:60])
    for name in ("a.png", "cut.png", "missing.png"):
        with pytest.raises(FileError):
            images.read_image(tmp_path / name)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    atomic.write_text(target, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "a.txt")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError):
        atomic.write_text(target, "new")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_folder_replaces_the_old_one(tmp_path):
    for content in ("one", "two"):
        with atomic_write(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"] and len(list(tmp_path.iterdir())) == 1


# Native folders


def test_native_folder_round_trip(tmp_path, tiny_vae):
    tiny_vae.save_pretrained(tmp_path)
    again = PretrainedModel.from_pretrained(tmp_path)
    assert isinstance(again, VQGanVAE) and again.config == tiny_vae.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), tiny_vae.state_dict().values(), strict=True)
    )
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.get_codebook_indices(image), tiny_vae.get_codebook_indices(image))


def test_half_precision_on_disk_is_single_in_memory(tmp_path, tiny_vae):
    tiny_vae.save_pretrained(tmp_path, dtype=torch.float16)
    again = VQGanVAE.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.allclose(again.codebook_weight, tiny_vae.codebook_weight, atol=1e-3)


def damage(name):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    return {
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "cut weights": cut,
        "no weights at all": lambda folder: (folder / "model.safetensors").write_bytes(b"junk"),
        "no config": lambda folder: (folder / "config.json").unlink(),
        "config of another": lambda folder: (folder / "config.json").write_text('{"class": "Nothing"}'),
        "unknown setting": lambda folder: (folder / "config.json").write_text('{"class": "VQGanVAE", "colour": 1}'),
        "other size": lambda folder: (folder / "config.json").write_text('{"class": "VQGanVAE", "ch": 32}'),
    }[name]


@pytest.mark.parametrize("what", ["no weights", "cut weights", "no weights at all", "no config", "config of another",
                                  "unknown setting", "other size"])  # fmt: skip
def test_damaged_folder_is_one_clear_line(tmp_path, tiny_vae, what):
    tiny_vae.save_pretrained(tmp_path / "m")
    damage(what)(tmp_path / "m")
    with pytest.raises(CheckpointError) as error:
        VQGanVAE.from_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, -1, 0, 2.5, "large", [], [3, -4], {"a": 1}, 10**30])
def test_absurd_settings_are_one_clear_line(tmp_path, tiny_bundle, value):
    for name in ("vae", "dalle", "clip"):
        path = tiny_bundle / name / "config.json"
        config = json.loads(path.read_text())
        for setting in config:
            path.write_text(json.dumps({**config, setting: value}))
            try:
                PretrainedModel.from_pretrained(tiny_bundle / name)
            except CheckpointError as error:
                assert str(path.parent) in str(error) and "\n" not in str(error)
        path.write_text(json.dumps(config))


def test_postscript_is_not_opened(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for it."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was run"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(FileError, match=r"cannot read image .*a\.png"):
        images.read_image(tmp_path / "a.png")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        VQGanVAE.from_pretrained(tmp_path / "nothing")
