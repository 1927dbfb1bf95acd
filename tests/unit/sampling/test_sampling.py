"""Sampling: filters, draws, and the cached loop against the plain forward pass."""

import math

import pytest
import torch
from factories import Letters

from dalle_pytorch.nn import cache as cache_module
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling import filters
from dalle_pytorch.sampling.filters import filter_logits, sample
from dalle_pytorch.sampling.loop import prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.vae.discrete import DiscreteVAE

OPTIONS = {
    "plain": {"shift_tokens": False},
    "shift": {},
    "learned": {"rotary_emb": False},
    "learned, no shift": {"rotary_emb": False, "shift_tokens": False},
    "patterns": {"attn_types": ("axial_row", "axial_col", "conv_like")},
    "sparse": {"sparse_attn": (True, False)},
    "reversible": {"reversible": True},
    "sandwich, stable": {"sandwich_norm": True, "stable": True},
    "shared": {"shared_attn_ids": (0, 1, 0), "shared_ff_ids": (0, 0, 1), "share_input_output_emb": True},
    "qk_norm": {"qk_norm": True},
}


def make_dalle(dtype: torch.dtype = torch.float64, **options) -> DALLE:
    """A tiny prior of 6×6 tokens whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=24, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=4)
    sizes = {"dim": 36, "num_text_tokens": 30, "text_seq_len": 6, "depth": 3, "heads": 2, "dim_head": 16}
    dalle = DALLE(vae=vae, **{**sizes, **options})
    with torch.no_grad():
        for parameter in dalle.transformer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return dalle.to(dtype).eval()


def make_text(batch: int = 1) -> torch.Tensor:
    text = torch.randint(1, 30, (batch, 6), generator=torch.Generator().manual_seed(2))
    text[:, 4:] = 0
    return text


# --------------------------------------------------------------------------------------------------
# Filters and draws


@pytest.mark.parametrize("top_k, kept", [(3, 3), (1, 1), (100, 8), (0.0, 8), (0.9, 1), (0.7, 6), (0.5, 8), (0.999, 1)])
def test_top_k_counts_over_all_tokens(top_k, kept):
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.5, -1.0, 4.0, 0.0, 0.25]])
    filtered = filter_logits(logits, top_k=top_k, num_total=20 if top_k != 0.9 else 10)
    assert torch.isfinite(filtered).sum() == kept
    order = logits[0].argsort(descending=True)
    assert torch.isfinite(filtered[0, order[:kept]]).all()


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.4, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert torch.isfinite(filter_logits(logits, top_p=top_p)).nonzero().flatten().tolist() == kept
    # The least top_p leaves one token, equals stay together, and top_k wins.
    assert torch.isfinite(filter_logits(logits, top_p=1e-9)).sum() == 1
    assert torch.isfinite(filter_logits(torch.tensor([1.0, 2.0, 2.0]), top_p=0.1)).sum() == 2
    assert torch.isfinite(filter_logits(logits, top_k=3, top_p=0.1)).sum() == 3


def test_draws_follow_the_filtered_distribution():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000
    tokens = sample(logits.expand(1000, 4), uniforms)
    assert tokens.bincount(minlength=4).tolist() == [200, 0, 500, 300]
    # Filtering comes before the temperature: at temperature 2, weights are the square roots of what top_p keeps.
    tokens = sample(filter_logits(logits, top_p=0.6).expand(1000, 4), uniforms, temperature=2)
    share = math.sqrt(0.5) / (math.sqrt(0.5) + math.sqrt(0.3))
    assert tokens.bincount(minlength=4).tolist() == [0, 0, round(1000 * share), 1000 - round(1000 * share)]
    assert sample(logits[None], torch.tensor([0.99]), temperature=0).tolist() == [2]


def test_draws_at_the_ends_of_the_interval():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert sample(logits, torch.tensor([0.0])).tolist() == [1]
    assert sample(logits, torch.tensor([1 - 2.0**-32], dtype=torch.float64)).tolist() == [2]


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 1e-9}, {"top_k": 40}, {"top_k": 0.99}, {"top_k": 0.1},
                                      {"top_p": 1.0}, {}, {"top_p": 0.9, "temperature": 0}])  # fmt: skip
def test_draw_is_filter_and_sample(settings, monkeypatch):
    """Rows that few tokens decide, rows that need all, and rows of equals at the end of those looked at."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None]
    logits = (torch.randn(6, 1000, generator=generator).double() * scale).repeat(50, 1)
    logits[-1, 20:] = -math.inf
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    settings = SamplingSettings(**settings)
    expected = sample(filter_logits(logits, settings.top_k, settings.top_p, 3000), uniforms, settings.temperature)
    sorted_rows = []
    monkeypatch.setattr(filters, "filter_logits", lambda logits, *args: (
        sorted_rows.append(len(logits)) or filter_logits(logits, *args)))  # fmt: skip
    assert torch.equal(filters.draw(logits, uniforms, settings, 3000), expected)
    if settings.top_p == 0.9 and settings.temperature:
        assert sorted_rows == [150]  # the three smallest scales
    if settings.top_k == 40:
        assert sorted_rows == [51]  # equals at the end, also those of the row that has fewer than 40


def test_uniforms_belong_to_seed_prompt_candidate_and_place():
    prompt = torch.tensor([5, 6, 0, 0])
    uniforms = candidate_uniforms(7, prompt, range(4), 16)
    assert uniforms.shape == (4, 16) and uniforms.min() >= 0 and uniforms.max() < 1
    assert torch.equal(uniforms[2:3, :9], candidate_uniforms(7, torch.tensor([5, 6]), [2], 9))
    for other in (candidate_uniforms(8, prompt, range(4), 16), candidate_uniforms(7, prompt + 1, range(4), 16)):
        assert not (uniforms == other).any()
    assert len(set(uniforms.flatten().tolist())) == 64
    # Recorded: the same on every machine and in every release.
    recorded = candidate_uniforms(0, torch.tensor([1, 2, 3]), [0, 1000], 2)
    assert (recorded * 2**32).long().tolist() == [[762466417, 187276447], [1451453864, 49752412]]


@pytest.mark.parametrize("settings, words", [
    ({"top_p": 0}, "top_p must be above 0"), ({"top_p": 1.5}, "1.5"), ({"top_p": math.nan}, "nan"),
    ({"top_k": -1}, "top_k"), ({"top_k": 1.5}, "1.5"), ({"top_k": math.inf}, "inf"),
    ({"temperature": -0.1}, "temperature must be 0"), ({"temperature": math.nan}, "nan"),
    ({"temperature": 1e-307}, "1e-12 and above"),
])  # fmt: skip
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingSettings(**settings)
    with pytest.raises(ValueError, match=words):
        make_dalle().generate_images(make_text(), **settings)


# --------------------------------------------------------------------------------------------------
# The cached loop


@pytest.mark.parametrize("primed", [0, 1, 6, 9], ids=lambda count: f"primed {count}")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_cached_logits_equal_the_plain_forward(options, primed):
    dalle, text = make_dalle(**options), make_text(2)
    tokens = torch.randint(0, 40, (2, 36), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = dalle(text, tokens)[:, 6 + primed :, dalle.num_text_tokens :]
        torch.testing.assert_close(dalle.next_token_logits(text, tokens)[:, primed:], expected, rtol=0, atol=1e-11)
        prefix = prefill(dalle, text, tokens[:, :primed])
        # Candidates in another order than the prompts, and more of them.
        rows = torch.tensor([1, 0, 1])
        cache = prefix.cache.gather(rows, dalle.total_seq_len)
        logits = [prefix.logits[rows]]
        for i in range(primed, 35):
            logits.append(dalle.step(tokens[rows, i], i, cache))
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[rows], rtol=0, atol=1e-11)


@pytest.mark.parametrize("primed", [0, 9], ids=lambda count: f"primed {count}")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_prompts_are_shared_by_their_candidates(options, primed, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)
    monkeypatch.setattr(cache_module, "SHARED_BY", 2)
    dalle, text = make_dalle(**options), make_text(3)
    tokens = torch.randint(0, 40, (3, 36), generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([2, 2, 0, 0])
    with torch.no_grad():
        expected = dalle.next_token_logits(text, tokens)[rows, primed + 1 :]
        cache = prefill(dalle, text, tokens[:, :primed]).cache.gather(rows, dalle.total_seq_len)
        for layer in cache.layers:
            assert layer.kv.prompts is not None and layer.kv.prompts.shape[1] == 2
            assert layer.kv.keys.shape[2] == dalle.total_seq_len - 7 - primed
        logits = [dalle.step(tokens[rows, i], i, cache) for i in range(primed, 35)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=0, atol=1e-11)


def test_prompts_of_different_numbers_of_candidates_are_not_shared(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)
    dalle = make_dalle()
    cache = prefill(dalle, make_text(2)).cache
    assert cache.gather(torch.tensor([0] * 8 + [1] * 9), 43).layers[0].kv.prompts is None
    assert cache.gather(torch.tensor([0] * 7), 43).layers[0].kv.prompts is None
    shared = cache.gather(torch.tensor([1] * 8), 43)
    assert shared.layers[0].kv.prompts is not None and shared.length == cache.length


@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@pytest.mark.parametrize("kept", [[0, 2, 4, 5], [1, 3, 4], [5]], ids=["as many of each prompt", "not", "of one"])
@pytest.mark.parametrize("shared_by", [1, 8], ids=["shared", "not shared"])
def test_candidates_that_are_left_out_are_not_drawn_further(kept, cond_scale, shared_by, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)
    monkeypatch.setattr(cache_module, "SHARED_BY", shared_by)
    dalle, text, rows = make_dalle(), make_text(2), torch.tensor([0, 0, 0, 1, 1, 1])
    uniforms = torch.rand(6, 36, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    settings, sizes = SamplingSettings(cond_scale=cond_scale), list[int]()
    select = {9: torch.tensor(kept), 20: torch.tensor([0])}
    with torch.no_grad():
        prefix = prefill(dalle, text, cond_scale=cond_scale)
        whole = sample_image_tokens(dalle, prefix, rows, uniforms, settings)
        step = dalle.step
        monkeypatch.setattr(dalle, "step", lambda last, *rest: sizes.append(len(last)) or step(last, *rest))
        part = sample_image_tokens(dalle, prefix, rows, uniforms, settings,
                                   select=lambda tokens: select.get(tokens.shape[1]))  # fmt: skip
    assert torch.equal(part[kept[0]], whole[kept[0]])
    assert (part[[row for row in range(6) if row != kept[0]]] == -1).all()
    doubled = 1 if cond_scale == 1 else 2
    assert sizes == [doubled * 6] * 8 + [doubled * len(kept)] * 11 + [doubled] * 16  # the first is of the prompt's pass


@pytest.mark.parametrize("cond_scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("primed", [None, 0, 15])
def test_cached_sampler_draws_what_the_plain_one_draws(cond_scale, primed):
    dalle, text = make_dalle(), make_text(3)
    text[2] = text[1]
    image = None if primed is None else torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(4)).double()
    settings = {"cond_scale": cond_scale, "img": image, "num_init_img_tokens": primed, "seed": 1, "return_tokens": True}
    images, tokens = dalle.generate_images(text, top_p=0.9, **settings)
    _, expected = dalle.generate_images(text, top_p=0.9, use_cache=False, **settings)
    assert torch.equal(tokens, expected)
    assert torch.equal(images, dalle.vae.decode_image(tokens))
    if primed:
        assert torch.equal(tokens[:, :primed], dalle.encode_image(image)[:, :primed])
        assert not torch.equal(tokens, dalle.encode_image(image))
    assert not torch.equal(tokens[1], tokens[2])


def test_learned_positions_of_cached_tokens():
    dalle, text = make_dalle(rotary_emb=False), make_text()
    settings = {"top_p": 0.9, "seed": 1, "return_tokens": True}
    _, tokens = dalle.generate_images(text, **settings)
    _, expected = dalle.generate_images(text, use_cache=False, **settings)
    assert torch.equal(tokens, expected)


def test_guidance_is_null_plus_scaled_difference():
    dalle, text = make_dalle(), make_text()
    first = dalle(text)[:, -1, dalle.num_text_tokens :]
    null = dalle(torch.zeros_like(text))[:, -1, dalle.num_text_tokens :]
    for scale in (0.0, 1.0, 3.0):
        _, tokens = dalle.generate_images(text, cond_scale=scale, temperature=0, return_tokens=True)
        assert tokens[0, 0] == (null + (first - null) * scale).argmax()


def draw_candidates(dalle, text, uniforms, batch_size, **settings):
    settings = SamplingSettings(**settings)
    prefix = prefill(dalle, text)
    return torch.cat([
        sample_image_tokens(dalle, prefix, torch.zeros(len(part), dtype=torch.long), part, settings)
        for part in uniforms.split(batch_size)
    ])  # fmt: skip


def test_batch_size_changes_no_candidate():
    dalle, text = make_dalle(), make_text()
    uniforms = candidate_uniforms(0, text[0], range(12), 36)
    expected = draw_candidates(dalle, text, uniforms, 12, top_p=0.9)
    assert len(expected.unique(dim=0)) == 12
    for batch_size in (1, 5):
        assert torch.equal(draw_candidates(dalle, text, uniforms, batch_size, top_p=0.9), expected)


def test_rounding_in_float32_changes_few_candidates():
    dalle, text = make_dalle(torch.float32), make_text()
    uniforms = candidate_uniforms(0, text[0], range(200), 36)
    batches = [draw_candidates(dalle, text, uniforms, size, top_p=0.9) for size in (200, 64, 25)]
    for other in batches[1:]:
        assert (batches[0] != other).any(dim=1).float().mean() < 0.01


def test_what_makes_steps_fast_changes_few_candidates(monkeypatch):
    dalle, text = make_dalle(torch.float32), make_text()
    uniforms = candidate_uniforms(0, text[0], range(200), 36)
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)
    fast = draw_candidates(dalle, text, uniforms, 50, top_p=0.9)
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 100)
    monkeypatch.setattr("dalle_pytorch.sampling.loop.prepared", lambda prior: prior)
    plain = draw_candidates(dalle, text, uniforms, 50, top_p=0.9)
    assert (fast != plain).any(dim=1).float().mean() < 0.01


def test_the_prompt_is_run_once_and_a_token_costs_one_token():
    dalle, text = make_dalle(), make_text()
    shapes = []
    forward = dalle.transformer.forward
    dalle.transformer.forward = lambda x, cache=None: shapes.append(tuple(x.shape[:2])) or forward(x, cache=cache)
    steps = []
    dalle.generate_images(text.expand(4, -1), on_token=lambda: steps.append(1))
    assert shapes == [(1, 7)] + [(4, 1)] * 35
    assert len(steps) == 36


def test_mode_and_global_random_numbers():
    dalle, text = make_dalle(attn_dropout=0.5), make_text()
    dalle.train()
    torch.manual_seed(3)
    first = dalle.generate_images(text)
    assert dalle.training and not first.requires_grad
    torch.manual_seed(3)
    assert torch.equal(first, dalle.generate_images(text))
    assert not torch.equal(first, dalle.generate_images(text))
    assert torch.equal(dalle.generate_images(text, seed=1), dalle.generate_images(text, seed=1))


def test_names_of_older_releases():
    dalle, text = make_dalle(), make_text(2)
    mask = torch.arange(6) < 2

    def tokens(**settings):
        return dalle.generate_images(settings.pop("text", text), seed=0, return_tokens=True, **settings)[1]

    assert torch.equal(tokens(filter_thres=0.9), tokens(top_k=0.9))
    assert torch.equal(tokens(top_k_thresh=0.9), tokens(top_k=0.9))
    assert torch.equal(tokens(top_p_thresh=0.5), tokens(top_p=0.5))
    assert torch.equal(tokens(), tokens(filter_thres=0.5))
    assert torch.equal(tokens(mask=mask.expand(2, 6)), tokens(text=text.masked_fill(~mask, 0)))
    assert torch.equal(tokens(text=torch.nn.functional.pad(text, (0, 3), value=9)), tokens())


def test_half_the_image_is_kept_unless_told_otherwise():
    dalle, image = make_dalle(), torch.rand(1, 3, 24, 24, dtype=torch.float64)
    given = dalle.encode_image(image)
    _, tokens = dalle.generate_images(make_text(3), img=image, return_tokens=True, seed=0)
    # 7/16 of 36 tokens.
    assert torch.equal(tokens[:, :15], given[:, :15].expand(3, -1)) and len(tokens[:, 15:].unique(dim=0)) == 3
    with pytest.raises(ValueError, match="expected 0 to 35 initial image tokens, got 36"):
        dalle.generate_images(make_text(), img=image, num_init_img_tokens=36)


def test_texts():
    dalle = make_dalle()
    tokens, texts = dalle.generate_texts(Letters(), "ab", seed=0, top_p=0.9)
    assert tokens.shape == (1, 6) and tokens[0, :2].tolist() == [1, 2]
    assert texts == [Letters().decode([token for token in tokens[0].tolist() if token])] and texts[0].startswith("ab")
    # What follows "ab" is the likeliest token of the plain forward pass, with <bos> before it; padding is shown as 0.
    tokens, _ = dalle.generate_texts(Letters(), "ab", temperature=0)
    likeliest = dalle(tokens)[0, 2, : dalle.num_text_tokens].argmax()
    assert tokens[0, 2] == (likeliest if likeliest < 30 else 0)
