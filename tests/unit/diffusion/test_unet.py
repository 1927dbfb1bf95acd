"""The U-Net against recorded outputs of guided-diffusion, and what is our own in it."""

import pytest
import torch
from factories import small_unet
from helpers import assert_matches, assert_same_weights

from dalle_pytorch.errors import CheckpointError
from diffusion import UNet, load_unet
from diffusion.unet import Upsample, timestep_embedding


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("num_channels", 64, "num_channels=32"),
        ("num_res_blocks", 2, "num_res_blocks=1"),
        ("channel_mult", "1,1,2,2", "channel_mult=1,1,1,2"),
        ("attention_resolutions", "16", "attention_resolutions=32"),
        ("learn_sigma", False, "learn_sigma=True"),
        ("resblock_updown", False, "resblock_updown=True"),
        ("use_scale_shift_norm", False, "use_scale_shift_norm=True"),
        ("emb_condition", False, "emb_condition=True"),
        ("emb_input_dims", 256, "emb_input_dims=24"),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_named_with_them(parity, flag, value, shown):
    with pytest.raises(CheckpointError) as error:
        load_unet(parity("unet/adm_tokens_256_style") / "model.pt", image_size=64, **{flag: value})
    assert f"{flag}=" in str(error.value) and shown in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_architecture_is_read_back_from_any_weights(tmp_path, updown, scale_shift):
    unet = small_unet(
        channel_mult=(0.5, 1, 1.5), num_channels=64, num_res_blocks=2, attention_resolutions=(16, 8), class_cond=True,
        learn_sigma=True, resblock_updown=updown, use_scale_shift_norm=scale_shift, use_new_attention_order=False,
    )  # fmt: skip
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    opened = load_unet(tmp_path / "model.pt", image_size=32)
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([0.0, 999.0]), torch.tensor([0, 999])
    assert_matches(opened(x, t, y=y), unet(x, t, y=y))


@pytest.mark.parametrize("content", [b"", b"no zip archive", {"a": torch.zeros(2)}, {"a": "text"}, [torch.zeros(2)]])
def test_files_that_are_no_unet_are_one_clear_line(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        load_unet(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_with_code_in_it_is_refused_unrun(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"time_embed.0.weight": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        load_unet(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_flag_is_named(tmp_path):
    torch.save(small_unet().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="num_chanels"):
        load_unet(tmp_path / "model.pt", num_chanels=32)


# --------------------------------------------------------------------------------------------------


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([2.5]), 8)
    frequencies = 10_000 ** (-torch.arange(4) / 4)
    assert torch.allclose(embedding[0], torch.cat([(2.5 * frequencies).cos(), (2.5 * frequencies).sin()]))


def test_folding_pixels_keeps_the_size_and_costs_less():
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for patch_size in (1, 4):
        unet = small_unet(patch_size=patch_size, image_size=64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert unet(torch.randn(1, 3, 64, 64), torch.zeros(1)).shape == (1, 3, 64, 64)
        flops.append(counter.get_total_flops())
    assert flops[1] < flops[0] / 10


def test_tokens_and_a_picture_condition_the_same_network_at_any_crop():
    unet = small_unet(image_size=64, patch_size=2, emb_condition=True, emb_input_dims=5, emb_output_dims=32,
                      emb_stride=1, low_res_condition=True)  # fmt: skip
    for side in (64, 32):
        x, t = torch.randn(2, 3, side, side), torch.tensor([5.0, 500.0])
        embeds, low_res = torch.randn(2, 5, side // 4, side // 4), torch.rand(2, 3, side // 2, side // 2)
        output = unet(x, t, embeds, low_res)
        assert output.shape == x.shape
        assert not torch.allclose(output, unet(x, t, embeds.flip(0), low_res), atol=1e-2)
        assert not torch.allclose(output, unet(x, t, embeds, low_res.flip(0)), atol=1e-2)
        # Nothing in it looks across the batch.
        assert_matches(output[1:], unet(x[1:], t[1:], embeds[1:], low_res[1:]))


def test_what_the_network_is_not_conditioned_on_is_refused():
    unet = small_unet(emb_condition=True, emb_input_dims=5, emb_output_dims=32)
    x, t = torch.randn(1, 3, 32, 32), torch.zeros(1)
    with pytest.raises(ValueError, match="emb_condition=True needs image_embeds"):
        unet(x, t)
    with pytest.raises(ValueError, match="low_res_condition=False takes no low_res"):
        unet(x, t, torch.randn(1, 5, 32, 32), low_res=x)
    with pytest.raises(ValueError, match=r"token grid of \(32, 32\) .* got \(16, 16\)"):
        unet(x, t, torch.randn(1, 5, 16, 16))
    with pytest.raises(ValueError, match="multiples of 2 pixels"):
        unet(torch.randn(1, 3, 33, 32), t, torch.randn(1, 5, 32, 32))


def test_widths_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="is 32, 48: expected multiples of 32"):
        UNet(num_channels=32, channel_mult=(1, 1.5))


def test_it_starts_from_zero_and_learns_everywhere():
    torch.manual_seed(0)
    unet = UNet(image_size=16, num_channels=32, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(8,))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0])
    assert not unet(x, t).any()
    unet = small_unet(attention_resolutions=(16,), resblock_updown=False)
    unet(x, t).square().mean().backward()
    assert any(isinstance(module, Upsample) for module in unet.modules())
    assert all(parameter.grad.any() for name, parameter in unet.named_parameters() if "qkv.bias" not in name)


def test_native_folder_keeps_it(tmp_path):
    unet = small_unet(patch_size=2, attention_resolutions=(8,), learn_sigma=True)
    unet.save_pretrained(tmp_path / "unet")
    again = UNet.from_pretrained(tmp_path / "unet")
    assert again.config == unet.config
    assert_same_weights(again, unet)
