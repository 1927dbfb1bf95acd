"""The prior: the same numbers as DALLE-pytorch, its loss, its patterns, reversible layers, checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.nn.masks import SparsePattern, make_pattern
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.published.dalle import load_dalle
from dalle_pytorch.published.vaes import load_discrete_vae
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.discrete import DiscreteVAE

CASES = ["full_rotary_shift", "full_learned_pos", "axial_conv", "reversible", "shared_layers", "stable_sandwich",
         "dall3_default"]  # fmt: skip


class Grid(ImageTokenizer):
    """An image tokenizer that only has sizes."""

    codebook_weight = encode_logits = decode_embeddings = None

    def __init__(self, image_size: int = 32, num_layers: int = 3, num_tokens: int = 40):
        super().__init__()
        self.image_size, self.num_layers, self.num_tokens = image_size, num_layers, num_tokens


def make_dalle(seed: int = 0, vae=None, **options) -> DALLE:
    torch.manual_seed(seed)
    sizes = {"dim": 32, "num_text_tokens": 30, "text_seq_len": 6, "depth": 3, "heads": 2, "dim_head": 16}
    return DALLE(vae=vae or Grid(), **{**sizes, **options})


def make_batch(batch: int = 2):
    torch.manual_seed(1)
    text = torch.randint(1, 30, (batch, 6))
    text[:, 4:] = 0
    return text, torch.randint(0, 40, (batch, 16))


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    assert (actual - reference).abs().max() <= 1e-4 * reference.abs().max()


# --------------------------------------------------------------------------------------------------
# Against DALLE-pytorch


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_upstream(parity, case):
    folder = parity(f"dalle/{case}")
    golden = load_file(folder / "golden.safetensors")
    dalle = load_dalle(folder / "dalle.pt")
    text, tokens = golden["text"], golden["image_tokens"]
    allowed = golden["logits_allowed"].bool()
    with torch.no_grad():
        logits, early = dalle(text, tokens), dalle(text, tokens[:, :5])
        decoded = golden["decoded_image"]
        assert_close(dalle.vae.decode(tokens[: len(decoded)]), decoded)
    masked = torch.finfo(logits.dtype).min
    assert torch.equal(logits > masked, allowed)
    assert_close(logits[allowed], golden["logits"][allowed])
    assert_close(early[early > masked], golden["logits_after_5_tokens"][early > masked])
    embedding = (dalle.to_logits if dalle.image_emb is None else dalle.image_emb).weight
    loss = dalle(text, tokens, return_loss=True)
    loss.backward()
    assert_close(loss, golden["loss"])
    assert_close(embedding.grad, golden["grad_image_emb"])


@pytest.mark.parametrize("case", ["dvae_gumbel", "dvae_straight_through"])
def test_discrete_vae_same_numbers_as_upstream(parity, case):
    folder = parity(f"dalle/{case}")
    golden = load_file(folder / "golden.safetensors")
    vae = load_discrete_vae(folder / "vae.pt")
    with torch.no_grad():
        assert_close(vae(golden["image"], return_logits=True), golden["encoder_logits"])
        assert torch.equal(vae.get_codebook_indices(golden["image"]), golden["indices"])
        decoded = vae.decode(golden["indices"])
    assert_close(decoded, golden["decoded"])
    assert torch.allclose(vae.decode_image(golden["indices"]), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Patterns


def visible_by_definition(attn_type: str, text_len: int, side: int) -> torch.Tensor:
    size = text_len + side * side
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(query + 1):
            (row, column), (key_row, key_column) = divmod(query - text_len, side), divmod(key - text_len, side)
            mask[query, key] = (
                key < text_len
                or {
                    "axial_row": row == key_row,
                    "axial_col": column == key_column,
                    "conv_like": row - key_row < 5 and 0 <= column - key_column < 5,
                }[attn_type]
            )
    return mask


@pytest.mark.parametrize("attn_type", ["axial_row", "axial_col", "conv_like"])
def test_patterns(attn_type):
    pattern = make_pattern(attn_type, text_len=3, image_fmap_size=8)
    assert torch.equal(pattern(0, 67), visible_by_definition(attn_type, 3, 8))
    assert torch.equal(pattern(40, 41), visible_by_definition(attn_type, 3, 8)[40:41, :41])


def test_sparse_pattern():
    pattern = SparsePattern(text_len=20, seq_len=276, seed=0)
    mask = pattern(0, 276)
    assert torch.equal(mask, mask.tril()) and mask.diagonal().all()
    assert mask[20:, :20].all()
    # Block 17 begins at 272: its window of four is blocks 16 and 17, and a few earlier ones are random.
    assert mask[275, 256:].all()
    blocks = mask[275, 32:256].view(-1, 16)
    assert torch.equal(blocks.all(1), blocks.any(1)) and 0 < blocks.any(1).sum() < len(blocks)
    assert not torch.equal(mask, SparsePattern(20, 276, seed=1)(0, 276))


def test_unknown_attention_type():
    with pytest.raises(ValueError, match="unknown attention type 'axial'"):
        make_dalle(attn_types=("full", "axial"))


# --------------------------------------------------------------------------------------------------
# Forward and loss


def test_loss_is_that_of_the_masked_logits():
    dalle, (text, tokens) = make_dalle(), make_batch()
    logits = dalle(text, tokens)
    labels = torch.cat((dalle.prepare_text(text)[:, 1:], tokens + dalle.num_text_tokens), dim=1)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = (losses[:, :6].mean() + 7 * losses[:, 6:].mean()) / 8
    torch.testing.assert_close(dalle(text, tokens, return_loss=True), expected)

    weights = torch.rand(2, 16)
    expected = (losses[:, :6].mean() + 7 * (losses[:, 6:] * weights).sum() / weights.sum()) / 8
    torch.testing.assert_close(dalle(text, tokens, return_loss=True, image_weights=weights), expected)


@pytest.mark.parametrize("options", [{}, {"attn_types": ("axial_col", "conv_like")}, {"sparse_attn": True}])
def test_no_position_sees_what_follows(options):
    dalle, (text, tokens) = make_dalle(**options).eval(), make_batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 40
    logits, other = dalle(text, tokens), dalle(text, changed)
    # Token 9 goes in at position 7 + 9.
    assert torch.equal(logits[:, :16], other[:, :16])
    assert not torch.allclose(logits[:, 16], other[:, 16])


def test_padding_at_each_position_is_a_token():
    dalle = make_dalle()
    text = torch.tensor([[5, 0, 7, 0, 0, 0]])
    # <bos>, and after the 30 words of the vocabulary a token for the padding at each of 6 positions.
    assert dalle.prepare_text(text).tolist() == [[0, 5, 31, 7, 33, 34, 35]]


def test_stable_scales_the_gradient_and_the_output():
    """A tenth of the embeddings' gradient, and an output divided by its largest channel (arXiv:2105.13290)."""
    dalle = make_dalle(stable=True)
    dalle.transformer = torch.nn.Module()
    dalle.transformer.forward = lambda x, cache=None: x
    emb = torch.rand(2, 5, 32, requires_grad=True)
    hidden = dalle.hidden(emb)
    expected = dalle.norm(emb / emb.detach().amax(-1, keepdim=True))
    torch.testing.assert_close(hidden, expected)
    weight = torch.randn_like(emb)
    (gradient,), (plain,) = (torch.autograd.grad((out * weight).sum(), emb) for out in (hidden, expected))
    torch.testing.assert_close(gradient, plain / 10)


def test_mask_makes_padding():
    dalle, (text, tokens) = make_dalle().eval(), make_batch()
    mask = torch.arange(6) < 2
    expected = dalle(text.masked_fill(~mask, 0), tokens)
    assert torch.equal(dalle(text, tokens, mask=mask.expand(2, 6)), expected)


def test_null_condition_drops_the_text_and_leaves_it_unchanged():
    dalle, (text, tokens) = make_dalle().eval(), make_batch()
    before = text.clone()
    assert torch.equal(dalle(text, tokens, null_cond_prob=1.0), dalle(torch.zeros_like(text), tokens))
    assert torch.equal(text, before)


def test_image_noise_is_shown_and_not_predicted():
    dalle = make_dalle()
    text, tokens = make_batch()
    assert not torch.equal(tokens[0], tokens[1])
    clean = dalle(text, tokens, return_loss=True)
    torch.manual_seed(0)
    assert not torch.equal(dalle(text, tokens, return_loss=True, image_noise=1.0), clean)
    # A token that is replaced by its like is none that is wrong.
    alike, first = tokens[:1].expand(2, -1), text[:1].expand(2, -1)
    noisy = dalle(first, alike, return_loss=True, image_noise=1.0)
    assert torch.equal(noisy, dalle(first, alike, return_loss=True))


def test_wrong_shapes_are_named():
    dalle, (text, tokens) = make_dalle(), make_batch()
    with pytest.raises(ValueError, match=r"expected text of shape \(batch, 6\), got \(2, 5\)"):
        dalle(text[:, :5], tokens)
    with pytest.raises(ValueError, match="16 tokens"):
        dalle(text, tokens[:, :4], return_loss=True)
    with pytest.raises(ValueError, match="expected at most 16 image tokens, got 17"):
        dalle(text, torch.zeros(2, 17, dtype=torch.long))


def test_layer_scale_falls_with_depth():
    layers = make_dalle(depth=26).transformer.layers
    scales = [layers[i].attn.scale.detach().mean().item() for i in (0, 17, 18, 23, 24)]
    assert scales == pytest.approx([0.1, 0.1, 1e-5, 1e-5, 1e-6])


def test_shared_layers_share_only_attention_and_feed_forward():
    layers = make_dalle(depth=4, shared_attn_ids=(0, 1, 0, 1), shared_ff_ids=(0, 0, 1, 1)).transformer.layers
    assert layers[0].attn.fn is layers[2].attn.fn and layers[0].attn.fn is not layers[1].attn.fn
    assert layers[0].ff.fn is layers[1].ff.fn and layers[0].ff.norm is not layers[1].ff.norm
    with pytest.raises(ValueError, match="full and axial_row"):
        make_dalle(depth=2, attn_types=("full", "axial_row"), shared_attn_ids=(0, 0))


# --------------------------------------------------------------------------------------------------
# Reversible


@pytest.mark.parametrize("shared", [{}, {"shared_attn_ids": (0, 0, 0), "shared_ff_ids": (0, 1, 0)}])
def test_reversible_gradients_equal_the_plain_ones(shared):
    dalle, (text, tokens) = make_dalle(reversible=True, stable=True, **shared).double(), make_batch()
    dalle(text, tokens, return_loss=True).backward()
    grads = {name: parameter.grad for name, parameter in dalle.named_parameters()}
    dalle.zero_grad()
    # The plain pass: a cache makes the transformer take it, and there is nothing before the first token.
    forward = dalle.transformer.forward
    dalle.transformer.forward = lambda x, cache=None: forward(x, cache=_NoCache(len(dalle.transformer.layers)))
    dalle(text, tokens, return_loss=True).backward()
    for name, parameter in dalle.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, msg=name)


class _NoCache:
    """A cache that remembers nothing."""

    class Layer:
        kv = attn_ring = ff_ring = None

    def __init__(self, depth: int):
        self.length, self.layers = 0, [self.Layer] * depth


def test_reversible_dropout_is_drawn_once():
    dalle, (text, tokens) = make_dalle(reversible=True, attn_dropout=0.5, ff_dropout=0.5).double(), make_batch()
    weight = dalle.transformer.layers[0].ff.fn.proj_in.weight

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return dalle(text, tokens, return_loss=True)

    loss().backward()
    with torch.no_grad():
        step = 1e-5
        weight[0, 0] += step
        above = loss()
        weight[0, 0] -= 2 * step
        below = loss()
    assert float(weight.grad[0, 0]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def tiny_discrete_vae(num_tokens: int = 40) -> DiscreteVAE:
    return DiscreteVAE(image_size=32, num_tokens=num_tokens, codebook_dim=8, hidden_dim=8)


@pytest.mark.parametrize("options", [
    {},
    {"sparse_attn": (True, False), "rotary_emb": False, "qk_norm": True},
    {"shared_attn_ids": (0, 1, 0), "share_input_output_emb": True, "reversible": True, "sandwich_norm": True},
])  # fmt: skip
def test_round_trip(tmp_path, options):
    dalle, (text, tokens) = make_dalle(vae=tiny_discrete_vae(), **options).eval(), make_batch()
    dalle.save_pretrained(tmp_path)
    again = DALLE.from_pretrained(tmp_path)
    assert torch.equal(again(text, tokens), dalle(text, tokens))
    assert torch.equal(again.vae.decode_image(tokens), dalle.vae.decode_image(tokens))
    assert not any(parameter.is_meta for parameter in again.parameters())


def test_random_blocks_are_kept_with_the_weights(tmp_path):
    dalle = make_dalle(vae=tiny_discrete_vae(), text_seq_len=6, image_fmap_size=12, attn_types="sparse")
    layout = dalle.transformer.layers[0].attn.fn.pattern.layout
    layout[5] = ~layout[5]
    dalle.save_pretrained(tmp_path)
    assert torch.equal(DALLE.from_pretrained(tmp_path).transformer.layers[0].attn.fn.pattern.layout, layout)


def test_vae_may_stay_elsewhere(tmp_path):
    make_dalle(vae=Grid()).save_pretrained(tmp_path / "dalle", save_vae=False)
    assert "vae" not in json.loads((tmp_path / "dalle/config.json").read_text())
    with pytest.raises(CheckpointError, match="has no VAE"):
        DALLE.from_pretrained(tmp_path / "dalle")
    tiny_discrete_vae().save_pretrained(tmp_path / "vae")
    assert isinstance(DALLE.from_pretrained(tmp_path / "dalle").vae, DiscreteVAE)


def test_a_vae_that_does_not_fit_is_one_line(tmp_path, parity):
    make_dalle(vae=tiny_discrete_vae()).save_pretrained(tmp_path)
    for path in (tmp_path, parity("dalle/axial_conv") / "dalle.pt"):
        with pytest.raises(CheckpointError, match=r"^[^\n]*expected a VAE of (40|64) image tokens, got 50$"):
            load_dalle(path, vae=tiny_discrete_vae(50))


def test_grid_of_its_own_for_a_vae_of_another_size():
    dalle = make_dalle(vae=tiny_discrete_vae(), image_fmap_size=2)
    assert dalle.image_seq_len == 4
    assert dalle.encode_image(torch.rand(1, 3, 32, 32)).shape == (1, 4)


def test_vae_is_not_trained():
    dalle, (text, _) = make_dalle(vae=tiny_discrete_vae()), make_batch()
    dalle.train()
    dalle(text, torch.rand(2, 3, 32, 32), return_loss=True).backward()
    assert not dalle.vae.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in dalle.vae.parameters())


class _Touch:
    """An object whose pickle would make a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_damaged_or_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "dalle.pt"
    with pytest.raises(CheckpointError, match="is missing"):
        load_dalle(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"^[^\n]*dalle.pt is damaged"):
        load_dalle(path)
    torch.save({"hparams": {"dim": 8, "hook": _Touch(tmp_path / "touched")}, "weights": {}}, path)
    with pytest.raises(CheckpointError, match="more than tensors and settings"):
        load_dalle(path)
    assert not (tmp_path / "touched").exists()
    torch.save({"hparams": {"dim": 8, "depth": 1}, "weights": {}}, path)
    with pytest.raises(CheckpointError, match="not a prior of DALLE-pytorch"):
        load_dalle(path)


# --------------------------------------------------------------------------------------------------
# DiscreteVAE in training


@pytest.mark.parametrize("options", [{}, {"straight_through": True}, {"straight_through": True, "reinmax": True},
                                     {"smooth_l1_loss": True, "num_resnet_blocks": 1}])  # fmt: skip
def test_discrete_vae_learns(options):
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=16, codebook_dim=8, num_layers=2, hidden_dim=16, **options)
    images = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = vae(images, return_loss=True, return_recons=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert vae.encoder[0][0].weight.grad.abs().sum() > 0
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_discrete_vae_losses():
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=16, codebook_dim=8, num_layers=2, hidden_dim=16, kl_div_loss_weight=0.5)
    images = torch.rand(2, 3, 16, 16)

    def run(**kwargs):
        torch.manual_seed(0)
        return vae(images, **kwargs)

    probabilities = vae(images, return_logits=True).softmax(1)
    divergence = (probabilities * (probabilities * 16).log()).sum()
    torch.testing.assert_close(run(return_loss=True), run(return_recon_loss=True) + 0.5 * divergence)
