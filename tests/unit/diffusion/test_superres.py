"""Super-resolution as a second stage: guided-diffusion's recorded run, any size, and what is refused."""

from dataclasses import replace

import pytest
import torch
from factories import small_unet
from helpers import assert_same_weights

from dalle_pytorch.errors import CheckpointError, UsageError
from diffusion.published import load_super_resolution


@pytest.fixture
def case(parity):
    return parity("unet/adm_superres")


def test_a_picture_is_its_own_at_any_size(case):
    torch.manual_seed(0)
    superres = load_super_resolution(case / "model.pt").double()
    small, calls = torch.rand(2, 3, 8, 8), []
    both = superres.enlarge(small, 30, [(0, 1), (0, 2)], 2, callback=lambda: calls.append(1))
    assert both.shape == (2, 3, 32, 32) and len(calls) == 2 and both.min() >= 0 and both.max() <= 1
    # On average: random weights magnify what a convolution over another batch rounds otherwise.
    assert (both[1:] - superres.enlarge(small[1:], 32, [(0, 2)], 2)).abs().mean() < 1e-3
    assert (both[1:] - superres.enlarge(small[1:], 32, [(0, 3)], 2)).abs().mean() > 0.1


def test_native_folder(case, tmp_path):
    superres = load_super_resolution(case / "model.pt", large_size=64)
    superres.unet.save_pretrained(tmp_path / "unet")
    again = load_super_resolution(tmp_path / "unet")
    assert again.unet.config == superres.unet.config
    assert_same_weights(again, superres)
    one, other = again.denoiser, superres.denoiser
    assert torch.equal(one.schedule.betas, other.schedule.betas)
    assert replace(one, network=None, schedule=None) == replace(other, network=None, schedule=None)
    with pytest.raises(UsageError, match=r"config\.json sets num_heads"):
        load_super_resolution(tmp_path / "unet", num_heads=2)


def test_classes(tmp_path):
    unet = small_unet(low_res_condition=True, class_cond=True, learn_sigma=True, use_new_attention_order=False)
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    small = torch.rand(1, 3, 8, 8)
    one, other = (load_super_resolution(tmp_path / "model.pt", label) for label in (0, 999))
    assert not torch.equal(one.enlarge(small, 32, [0], 2), other.enlarge(small, 32, [0], 2))
    with pytest.raises(CheckpointError, match=r"model\.pt .*needs an ImageNet class"):
        load_super_resolution(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="class from 0 to 999"):
        load_super_resolution(tmp_path / "model.pt", 1000)


def test_other_unets_are_refused(parity, case):
    for name in ("adm_fixed_variance_4000", "adm_tokens_256_style"):
        with pytest.raises(CheckpointError, match=r"model\.pt .*this U-Net is not for super-resolution"):
            load_super_resolution(parity(f"unet/{name}") / "model.pt")
    with pytest.raises(CheckpointError, match="takes no class"):
        load_super_resolution(case / "model.pt", 3)
