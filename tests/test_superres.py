"""Super-resolution as a second stage: guided-diffusion's recorded run, any size, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_unet import assert_matches, read_case, small_unet
from test_upscale import call, fails, folder, model, pixels  # noqa: F401  fixtures among them

from dalle_pytorch.errors import CheckpointError
from diffusion.published import load_super_resolution
from diffusion.super_resolution import SuperResolution


@pytest.fixture
def case(parity):
    return parity("unet/adm_superres")


class Recorded:
    """In the place of `Noise`: the recorded start and the noise of each step."""

    def __init__(self, tensors):
        self.tensors = iter(tensors)

    def __call__(self):
        return next(self.tensors)


@pytest.mark.parametrize("sampler, result", [("ddim", "ddim_eta0_sample"), ("ddpm", "ancestral_sample")])
def test_enlarges_as_recorded(case, sampler, result, monkeypatch):
    flags, golden, _ = read_case(case)
    steps = flags.pop("timestep_respacing")
    noise = Recorded([golden["x"], *golden["ancestral_noise"]])
    monkeypatch.setattr("diffusion.superres.Noise", lambda *arguments: noise)
    superres = load_super_resolution(case / "model.pt", **flags)
    small = golden["low_res"] / 2 + 0.5
    pictures = superres.enlarge(small, 32, range(4), steps, sampler)
    assert_matches(pictures, (golden[result] / 2 + 0.5).clamp(0, 1))


def test_a_picture_is_its_own_at_any_size(case):
    torch.manual_seed(0)
    superres = load_super_resolution(case / "model.pt")
    small, calls = torch.rand(2, 3, 8, 8), []
    both = superres.enlarge(small, 30, [(0, 1), (0, 2)], 2, callback=lambda: calls.append(1))
    assert both.shape == (2, 3, 32, 32) and len(calls) == 2 and both.min() >= 0 and both.max() <= 1
    # On average: random weights magnify what a convolution over another batch rounds otherwise.
    assert (both[1:] - superres.enlarge(small[1:], 32, [(0, 2)], 2)).abs().mean() < 1e-3
    assert (both[1:] - superres.enlarge(small[1:], 32, [(0, 3)], 2)).abs().mean() > 0.1


def test_native_folder(case, tmp_path):
    superres = load_super_resolution(case / "model.pt", large_size=64)
    superres.unet.save_pretrained(tmp_path / "unet")
    again, small = load_super_resolution(tmp_path / "unet"), torch.rand(1, 3, 8, 8)
    assert torch.allclose(again.enlarge(small, 32, [0], 2), superres.enlarge(small, 32, [0], 2), atol=1e-5)
    with pytest.raises(CheckpointError, match="tells its num_heads itself"):
        load_super_resolution(tmp_path / "unet", num_heads=2)


def test_classes(tmp_path):
    unet = small_unet(low_res_condition=True, class_cond=True, learn_sigma=True, use_new_attention_order=False)
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    small = torch.rand(1, 3, 8, 8)
    one, other = (load_super_resolution(tmp_path / "model.pt", label) for label in (0, 999))
    assert not torch.equal(one.enlarge(small, 32, [0], 2), other.enlarge(small, 32, [0], 2))
    with pytest.raises(CheckpointError, match=r"model\.pt: .*wants to be told a class"):
        load_super_resolution(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="numbers from 0 to 999"):
        load_super_resolution(tmp_path / "model.pt", 1000)


def test_other_unets_are_refused(parity, case):
    for name in ("adm_fixed_variance_4000", "adm_tokens_64_style"):
        with pytest.raises(CheckpointError, match=r"model\.pt: this U-Net is not one for super-resolution"):
            load_super_resolution(parity(f"unet/{name}") / "model.pt")
    with pytest.raises(CheckpointError, match="takes no class"):
        load_super_resolution(case / "model.pt", 3)


# --------------------------------------------------------------------------------------------------
# upscale.py


def difference(a, b) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


def test_second_stage_of_upscale(model, folder, tmp_path, case, monkeypatch):  # noqa: F811
    options = ("--input", folder / "0.npy", "--super_res_path", case / "model.pt")
    sizes, enlarge = [], SuperResolution.enlarge

    def spy(self, pictures, size, *arguments, **keywords):
        sizes.append((tuple(pictures.shape), size))
        return enlarge(self, pictures, size, *arguments, **keywords)

    monkeypatch.setattr(SuperResolution, "enlarge", spy)
    call(*options, "--output_size", 160, "--num_batches", 2, "--outputs_dir", tmp_path / "a")
    assert sizes == [((1, 3, 128, 128), 160)] * 2
    assert Image.open(tmp_path / "a/0-upscaled-1.png").size == (160, 160)
    assert Image.open(tmp_path / "a/before_after.png").size == (3 * 164 + 4, 164 + 4)
    assert difference(tmp_path / "a/0-upscaled.png", tmp_path / "a/0-upscaled-1.png") > 10
    call(*options, "--output_size", 160, "--batch_size", 2, "--outputs_dir", tmp_path / "b")
    assert difference(tmp_path / "a/0-upscaled-1.png", tmp_path / "b/0-upscaled-1.png") < 1
    # Not merely the first stage's picture, resized.
    call("--input", folder / "0.npy", "--output_size", 160, "--outputs_dir", tmp_path / "c")
    assert difference(tmp_path / "a/0-upscaled.png", tmp_path / "c/0-upscaled.png") > 10


def test_four_times_the_size_unless_told(model, folder, case, monkeypatch):  # noqa: F811
    monkeypatch.setattr(SuperResolution, "enlarge", lambda self, pictures, size, *_, **__: torch.rand(1, 3, size, size))
    call("--input", folder / "0.npy", "--super_res_path", case / "model.pt", "--super_res_flags", "num_heads=4")
    assert Image.open(folder / "0-upscaled.png").size == (512, 512)


def test_options_that_contradict(model, folder, case, parity, capsys):  # noqa: F811
    inputs = ("--input", folder / "0.npy")
    superres = ("--super_res_path", case / "model.pt")
    assert "above the decoder's 128 pixels" in fails(capsys, *inputs, *superres, "--output_size", 128)
    message = fails(capsys, *inputs, *superres, "--super_res_flags", "num_channels=64")
    assert "num_channels=64" in message and "num_channels=32" in message
    assert "NAME=VALUE" in fails(capsys, *inputs, *superres, "--super_res_flags", "num_channels")
    assert "go with --super_res_path" in fails(capsys, *inputs, "--super_res_class", 3)
    plain = parity("unet/adm_fixed_variance_4000") / "model.pt"
    assert "not one for super-resolution" in fails(capsys, *inputs, "--super_res_path", plain)
    assert "none.pt is missing" in fails(capsys, *inputs, "--super_res_path", "none.pt")
    assert "--unet_flags and --model_size go with" in fails(capsys, *inputs, "--unet_flags", "num_heads=2")
    assert not list(folder.glob("*.png"))
