"""Programs as users of DALLE-pytorch have them, with its keyword names, at tiny sizes: they run and do as they say."""

import pytest
import torch
from factories import Letters

from dalle_pytorch import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.nn.masks import SparsePattern

VAE_SIZES = {"image_size": 32, "num_layers": 2, "num_tokens": 48, "codebook_dim": 16, "hidden_dim": 8,
             "num_resnet_blocks": 1, "temperature": 0.9}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture
def text():
    text = torch.randint(1, 60, (3, 10))
    text[1, 6:] = 0
    return text


def make_dalle(**options) -> DALLE:
    sizes = {"dim": 32, "num_text_tokens": 60, "text_seq_len": 10, "depth": 2, "heads": 2, "dim_head": 16}
    return DALLE(vae=DiscreteVAE(**VAE_SIZES), **{**sizes, **options})


def make_clip() -> CLIP:
    return CLIP(
        dim_text=32, dim_image=32, dim_latent=16, num_text_tokens=60, text_enc_depth=1, text_seq_len=10, text_heads=2,
        num_visual_tokens=64, visual_enc_depth=1, visual_image_size=32, visual_patch_size=8, visual_heads=2,
    )  # fmt: skip


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------
# DiscreteVAE


def test_discrete_vae(images):
    vae = DiscreteVAE(**VAE_SIZES, straight_through=False)
    loss = vae(images, return_recon_loss=True)
    loss.backward()
    assert loss.ndim == 0 and gradients(vae).keys() == {name for name, _ in vae.named_parameters()}

    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = vae(images, return_loss=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    codes = vae.get_codebook_indices(images)
    assert codes.shape == (3, 64) and codes.dtype == torch.int64 and vae.decode(codes).shape == images.shape


def loss_of(images, **options):
    torch.manual_seed(1)
    vae = DiscreteVAE(**VAE_SIZES, **options)
    torch.manual_seed(2)
    loss = vae(images, return_loss=True)
    loss.backward()
    return loss, vae


def test_discrete_vae_options_change_what_they_name(images):
    plain, _ = loss_of(images)
    weighted, vae = loss_of(images, kl_div_loss_weight=0.25)
    probabilities = vae(images, return_logits=True).softmax(dim=1)
    divergence = (probabilities * (probabilities * 48).log()).sum()
    torch.testing.assert_close(weighted, plain + 0.25 * divergence)
    assert loss_of(images, smooth_l1_loss=True)[0] < plain
    hard, straight = loss_of(images, straight_through=True)
    better, reinmax = loss_of(images, straight_through=True, reinmax=True)
    # ReinMax has the same codes forward and another gradient backward.
    torch.testing.assert_close(hard, better)
    assert not torch.allclose(straight.encoder[0][0].weight.grad, reinmax.encoder[0][0].weight.grad)
    torch.testing.assert_close(straight.decoder[-1].weight.grad, reinmax.decoder[-1].weight.grad)


# --------------------------------------------------------------------------------------------------
# DALLE


def test_training_as_in_older_releases(images, text):
    dalle = make_dalle(attn_dropout=0.1, ff_dropout=0.1)
    mask = torch.ones_like(text).bool()
    loss = dalle(text, images, mask=mask, return_loss=True)
    loss.backward()
    assert loss.ndim == 0 and all(grad.isfinite().all() for grad in gradients(dalle).values())
    dalle.eval()
    whole = dalle(text, images, mask=mask, return_loss=True)
    torch.testing.assert_close(whole, dalle(text, images, return_loss=True))
    mask[:, 5:] = False
    padded = text.masked_fill(~mask, 0)
    expected = dalle(padded, images, return_loss=True)
    torch.testing.assert_close(dalle(text, images, mask=mask, return_loss=True), expected)
    # The condition is dropped from every text, and from none.
    nothing = dalle(torch.zeros_like(text), images, return_loss=True)
    torch.testing.assert_close(dalle(text, images, return_loss=True, null_cond_prob=1.0), nothing)
    torch.testing.assert_close(dalle(text, images, return_loss=True, null_cond_prob=0.0), whole)


def test_generate_images_with_every_keyword(images, text):
    dalle, clip = make_dalle(), make_clip()
    mask = torch.ones_like(text).bool()
    settings = {"mask": mask, "filter_thres": 0.9, "temperature": 1.0, "cond_scale": 3.0}
    drawn = dalle.generate_images(text, use_cache=True, **settings)
    assert drawn.shape == (3, 3, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
    drawn, scores = dalle.generate_images(text, clip=clip, top_k=0.5, **settings)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores, clip(text, drawn, return_loss=False))
    primed, tokens = dalle.generate_images(
        text, img=images, num_init_img_tokens=20, top_p=0.8, return_tokens=True, use_cache=False, **settings
    )
    assert torch.equal(tokens[:, :20], dalle.vae.get_codebook_indices(images)[:, :20])
    torch.testing.assert_close(primed, dalle.vae.decode_image(tokens))
    # One picture for all texts, and the older releases' share of it.
    _, tokens = dalle.generate_images(text, img=images[:1], return_tokens=True)
    assert torch.equal(tokens[:, :28], dalle.vae.get_codebook_indices(images[:1])[:, :28].expand(3, -1))
    assert len(dalle.generate_images(text, clip=clip, return_tokens=True)) == 3


@pytest.mark.parametrize("cond_scale", [1, 2.0])
@pytest.mark.parametrize("options", [{}, {"reversible": True, "attn_types": ("full", "axial_row")}])
def test_cache_changes_nothing(text, cond_scale, options):
    dalle = make_dalle(**options).double()
    drawn = [dalle.generate_images(text, cond_scale=cond_scale, use_cache=use_cache, return_tokens=True, seed=3)[1]
             for use_cache in (True, False)]  # fmt: skip
    assert torch.equal(*drawn)


def test_the_forks_names(text):
    dalle = make_dalle()
    for fork, ours in (({"top_k_thresh": 0.9}, {"top_k": 0.9}), ({"top_p_thresh": 0.3}, {"top_p": 0.3})):
        images, tokens = dalle.generate_images(text, return_tokens=True, seed=1, **fork)
        again, same = dalle.generate_images(text, return_tokens=True, seed=1, **ours)
        assert torch.equal(tokens, same) and torch.equal(images, again)
    # A mask's False is padding.
    mask = torch.arange(10).expand(3, 10) < 4
    drawn = [dalle.generate_images(*prompt, seed=1, return_tokens=True, **masked)[1]
             for prompt, masked in (((text,), {"mask": mask}), ((text * mask,), {}))]  # fmt: skip
    assert torch.equal(*drawn)


def test_generate_texts():
    dalle = make_dalle()
    tokens, texts = dalle.generate_texts(Letters(60), "abc", filter_thres=0.5)
    assert tokens.shape == (1, 10) and tokens[0, :3].tolist() == [1, 2, 3] and texts[0].startswith("abc")
    tokens, texts = dalle.generate_texts(Letters(60))
    assert tokens.shape == (1, 10) and len(texts) == 1


def test_tokens_of_another_tokenizer_are_one_line(text):
    dalle = make_dalle()
    text[0, 0] = 60
    for call in (lambda: dalle.generate_images(text), lambda: dalle.generate_texts(Letters(60), "é")):
        with pytest.raises(ValueError, match=r"text tokens below 60, got \d+: the prior has another tokenizer$"):
            call()


def test_reversible_of_depth_64(images, text):
    dalle = make_dalle(depth=64, reversible=True)
    dalle(text, images, return_loss=True).backward()
    names = {name for name, parameter in dalle.named_parameters() if parameter.requires_grad}
    assert gradients(dalle).keys() == names and all(grad.isfinite().all() for grad in gradients(dalle).values())
    assert dalle.generate_images(text[:1]).shape == (1, 3, 32, 32)


def patterns(dalle) -> list[object]:
    return [layer.attn.fn.pattern for layer in dalle.transformer.layers]


def test_attention_types_cycle_over_the_layers(images, text):
    types = ("full", "axial_row", "axial_col", "conv_like")
    dalle = make_dalle(depth=6, attn_types=types)
    masks = [None if pattern is None else pattern(0, 74) for pattern in patterns(dalle)]
    assert masks[0] is None and masks[4] is None and torch.equal(masks[1], masks[5])
    assert len({tuple(mask.flatten().tolist()) for mask in masks[1:4]}) == 3
    dalle(text, images, return_loss=True).backward()


def test_sparse_attention(images, text):
    dalle = make_dalle(depth=64, sparse_attn=(True, False) * 32)
    kinds = [isinstance(pattern, SparsePattern) for pattern in patterns(dalle)]
    assert kinds == [True, False] * 32
    loss = dalle(text, images, return_loss=True)
    loss.backward()
    mixed = make_dalle(depth=3, attn_types=("sparse", "axial_row", "sparse"), reversible=True)
    assert [isinstance(pattern, SparsePattern) for pattern in patterns(mixed)] == [True, False, True]
    # The random blocks are kept with the weights, and the same in every run.
    layouts = {name for name in mixed.state_dict() if name.endswith("pattern.layout")}
    again = make_dalle(attn_types="sparse")
    assert len(layouts) == 2 and torch.equal(patterns(mixed)[0].layout, patterns(again)[0].layout)
    assert mixed.generate_images(text[:1]).shape == (1, 3, 32, 32)


# --------------------------------------------------------------------------------------------------
# CLIP


def test_clip(images, text):
    clip, mask = make_clip(), text != 0
    loss = clip(text, images, text_mask=mask, return_loss=True)
    loss.backward()
    assert loss.ndim == 0 and gradients(clip).keys() == {name for name, _ in clip.named_parameters()}
    scores = clip(text, images, text_mask=mask, return_loss=False)
    other = text.clone()
    other[1, 6:] = 7
    torch.testing.assert_close(clip(other, images, text_mask=mask), scores)
    assert not torch.allclose(clip(other, images), clip(text, images))

    optimizer = torch.optim.Adam(clip.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = clip(text, images, text_mask=mask, return_loss=True)
        loss.backward()
        optimizer.step()
    assert loss < 0.5
