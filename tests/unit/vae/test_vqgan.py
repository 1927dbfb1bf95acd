"""The VQGAN."""

import pytest
import torch

from dalle_pytorch.vae.vqgan import GumbelQuantizer, VectorQuantizer, VQGanVAE


def test_interface(tiny_vae):
    image = torch.rand(2, 3, 64, 64)
    tokens = tiny_vae.get_codebook_indices(image)
    assert tokens.shape == (2, 256) and tokens.dtype == torch.int64 and tiny_vae.num_layers == 2
    assert tiny_vae.embed(tokens).shape == (2, 8, 16, 16)
    assert torch.equal(tiny_vae.embed(tokens)[1, :, 0, 5], tiny_vae.codebook_weight[tokens[1, 5]])
    picture = tiny_vae.decode_image(tokens)
    assert picture.shape == image.shape and picture.min() >= 0 and picture.max() <= 1
    assert torch.equal(tokens, tiny_vae.get_codebook_indices(image))


def test_sides_that_do_not_fit_are_refused(tiny_vae):
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny_vae.get_codebook_indices(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match="square"):
        tiny_vae.decode_image(torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize(("patch_size", "ch_mult", "layers"), [(1, (1, 1, 2, 2), 3), (4, (1, 2), 3), (1, (1,) * 5, 4)])
def test_downsampling_follows_from_the_levels(patch_size, ch_mult, layers):
    vae = VQGanVAE(image_size=32, num_tokens=8, embed_dim=8, z_channels=8, ch=8, ch_mult=ch_mult, num_res_blocks=1,
                   attn_resolutions=[8], patch_size=patch_size)  # fmt: skip
    assert vae.num_layers == layers
    assert vae.get_codebook_indices(torch.rand(1, 3, 32, 32)).shape == (1, (32 // 2**layers) ** 2)


def test_local_encoder_gives_equal_squares_equal_tokens():
    torch.manual_seed(0)
    vae = VQGanVAE(image_size=32, num_tokens=64, embed_dim=8, z_channels=8, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                   patch_size=4, local_encoder=True).eval()  # fmt: skip
    a, b = torch.rand(2, 1, 3, 32, 32)
    b[..., 8:16, 16:24] = a[..., 8:16, 16:24]
    b[..., 24:32, 0:8] = a[..., 8:16, 16:24]
    of_a, of_b = (vae.get_codebook_indices(picture).view(4, 4) for picture in (a, b))
    assert of_b[1, 2] == of_b[3, 0] == of_a[1, 2]
    assert not torch.equal(of_a, of_b)


def test_gumbel_projection_tied_to_codebook_finds_the_nearest_code():
    torch.manual_seed(0)
    codes, z = torch.randn(20, 6), torch.randn(2, 6, 3, 3)
    gumbel, nearest = GumbelQuantizer(20, 6), VectorQuantizer(20, 6)
    gumbel.set_codebook(codes)
    nearest.embedding.weight.data.copy_(codes)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 6), codes).argmin(1).reshape(2, 3, 3)
    assert torch.equal(gumbel.logits(z).argmax(1), distances)
    assert torch.equal(nearest.logits(z).argmax(1), distances)
