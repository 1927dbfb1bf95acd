"""The U-Net, its denoiser and samplers, and super-resolution against recorded outputs of guided-diffusion.

All in double precision: what is left is the rounding of the recording, magnified by its random weights, which is the
same on every machine (up to 5e-5 of the largest value, of 1e-4 allowed).
"""

import pytest
import torch
from helpers import UNET_CASES, assert_matches, read_case

from diffusion import load_unet
from diffusion.published import load_denoiser, load_super_resolution
from diffusion.samplers import sample_ancestral, sample_ddim


@pytest.mark.parametrize("case", UNET_CASES)
def test_published_weights_give_the_recorded_output(parity, case):
    folder = parity(f"unet/{case}")
    flags, golden, conditions = read_case(folder)
    unet = load_unet(folder / "model.pt", **flags).double()
    with torch.no_grad():
        output = unet(golden["x"], golden["t_network"], **conditions)
    assert_matches(output, golden["network_output"])


@pytest.mark.parametrize("case", UNET_CASES)
def test_what_the_weights_tell_need_not_be_given(parity, case):
    folder = parity(f"unet/{case}")
    flags, _, _ = read_case(folder)
    untold = ("image_size", "large_size", "num_heads", "num_head_channels", "use_new_attention_order")
    few = load_unet(folder / "model.pt", **{name: flags[name] for name in untold if name in flags})
    assert few.config == load_unet(folder / "model.pt", **flags).config
    as_text = {name: str(value) for name, value in flags.items()}
    assert few.config == load_unet(folder / "model.pt", **as_text).config


def last(steps):
    return list(steps)[-1][1]


@pytest.fixture(params=UNET_CASES)
def case(request, parity):
    folder = parity(f"unet/{request.param}")
    flags, golden, conditions = read_case(folder)
    denoiser = load_denoiser(folder / "model.pt", **flags).conditioned(**conditions)
    denoiser.network.double()
    return denoiser, golden


@torch.no_grad()
def test_predictions_match_the_recorded_ones(case):
    denoiser, golden = case
    x, step = golden["x"], golden["t_spaced"]
    assert denoiser.schedule.timestep_map.tolist() == golden["timestep_map"].tolist()
    assert torch.equal(denoiser.network_timesteps(step, len(x)), golden["t_network"])
    for prefix, clip in (("", False), ("clipped_", True)):
        prediction = denoiser(x, step, clip=clip)
        assert_matches(prediction.x_0, golden[f"{prefix}pred_xstart"])
        assert_matches(prediction.log_variance.expand_as(x), golden[f"{prefix}log_variance"])
        assert_matches(denoiser.posterior_mean(x, step, prediction.x_0), golden[f"{prefix}mean"])


@torch.no_grad()
def test_a_step_for_all_is_that_step_for_each(case):
    denoiser, golden = case
    x = golden["x"]
    for ours, each in zip(denoiser(x, 3), denoiser(x, torch.full((len(x),), 3)), strict=True):
        assert torch.allclose(ours.expand_as(x), each.expand_as(x), rtol=1e-5)


@torch.no_grad()
def test_samplers_end_at_the_recorded_pictures(case):
    denoiser, golden = case
    noise = iter(golden["ancestral_noise"].double())
    x = golden["x"].double()
    assert_matches(last(sample_ddim(denoiser, x, lambda: next(noise))), golden["ddim_eta0_sample"])
    assert_matches(last(sample_ancestral(denoiser, x, lambda: next(noise))), golden["ancestral_sample"])


class Recorded:
    """In the place of `Noise`: the recorded start and the noise of each step."""

    def __init__(self, tensors):
        self.tensors = iter(tensors)

    def __call__(self):
        return next(self.tensors)


@pytest.mark.parametrize("sampler, result", [("ddim", "ddim_eta0_sample"), ("ddpm", "ancestral_sample")])
def test_enlarges_as_recorded(parity, sampler, result, monkeypatch):
    case = parity("unet/adm_superres")
    flags, golden, _ = read_case(case)
    steps = flags.pop("timestep_respacing")
    noise = Recorded([golden["x"].double(), *golden["ancestral_noise"].double()])
    monkeypatch.setattr("diffusion.super_resolution.Noise", lambda *arguments: noise)
    superres = load_super_resolution(case / "model.pt", **flags).double()
    small = golden["low_res"].double() / 2 + 0.5
    pictures = superres.enlarge(small, 32, range(len(small)), steps, sampler)
    assert_matches(pictures, (golden[result] / 2 + 0.5).clamp(0, 1))
