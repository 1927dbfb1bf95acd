"""Priors in int8 and bfloat16: the same interface, near the same logits, candidates independent of each other."""

import copy

import pytest
import torch
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn import cache as cache_module
from dalle_pytorch.nn.linear import Int8Linear, has_int8
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling import dtypes, loop
from dalle_pytorch.sampling.dtypes import check_dtype, choose_dtype, converted, dtype_of
from dalle_pytorch.sampling.filters import draw
from dalle_pytorch.sampling.loop import evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.vae.discrete import DiscreteVAE

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this build of PyTorch has no FBGEMM for this processor")


def make_dalle(**options) -> DALLE:
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=24, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=4)
    sizes = {"dim": 64, "num_text_tokens": 30, "text_seq_len": 6, "depth": 2, "heads": 2, "dim_head": 32}
    dalle = DALLE(vae=vae, **{**sizes, **options}).eval().requires_grad_(False)
    dalle.transformer.set_layer_scale(1)
    return dalle


def texts(count: int) -> torch.Tensor:
    return torch.randint(1, 30, (count, 6), generator=torch.Generator().manual_seed(2))


def sample(prior: DALLE, rows: list[int], candidates: list[int], cond_scale: float = 1.0) -> torch.Tensor:
    """The tokens of some candidates, `rows[i]` the prompt of each."""
    text = texts(3)
    uniforms = torch.cat([candidate_uniforms(5, text[row], [i], 36) for row, i in zip(rows, candidates, strict=True)])
    with evaluation(prior):
        prefix = prefill(prior, text, None, cond_scale)
        settings = SamplingSettings(top_p=0.95, cond_scale=cond_scale)
        return sample_image_tokens(prior, prefix, torch.tensor(rows), uniforms, settings)


OPTIONS = {
    "plain": {}, "qk norm": {"qk_norm": True}, "tied": {"share_input_output_emb": True},
    "shared layers": {"shared_ff_ids": (0, 0), "shared_attn_ids": (0, 0)}, "learned positions": {"rotary_emb": False},
}  # fmt: skip


@needs_int8
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_int8_logits_are_near_those_of_float32(options):
    dalle = make_dalle(**options)
    int8 = converted(dalle, "int8")
    tokens = torch.randint(0, 40, (3, 36), generator=torch.Generator().manual_seed(3))
    expected, logits = (prior.next_token_logits(texts(3), tokens) for prior in (dalle, int8))
    assert 1e-4 < (logits - expected).std() / expected.std() < 0.06
    assert logits.dtype == torch.float32


@needs_int8
def test_all_linear_layers_of_a_step_are_replaced_and_nothing_else_is_copied():
    dalle = make_dalle(shared_ff_ids=(0, 0))
    before = copy.deepcopy(dalle.state_dict())
    int8 = converted(dalle, "int8")
    assert [type(module) for module in int8.modules() if "Linear" in type(module).__name__] == [Int8Linear] * 7
    assert int8.vae is dalle.vae and int8.text_emb.weight is dalle.text_emb.weight
    assert int8.is_int8 and not dalle.is_int8 and dtype_of(int8) == "int8" and dtype_of(dalle) == "float32"
    assert all(torch.equal(tensor, before[name]) for name, tensor in dalle.state_dict().items())
    assert sum(isinstance(module, nn.Linear) for module in dalle.modules()) == 7
    sizes = [sum(tensor.nbytes for tensor in prior.transformer.state_dict().values()) for prior in (dalle, int8)]
    assert sizes[1] < sizes[0] / 3


@needs_int8
@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_int8_candidates_are_the_same_alone_and_in_any_batch(cond_scale, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)  # prompts would be shared by 8 candidates
    int8, drawn_from = converted(make_dalle(), "int8"), []
    monkeypatch.setattr(loop, "draw", lambda logits, *given: drawn_from.append(logits) or draw(logits, *given))

    def tokens_and_logits(rows: list[int], candidates: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        drawn_from.clear()
        return sample(int8, rows, candidates, cond_scale), torch.stack(drawn_from, dim=1)

    tokens, logits = tokens_and_logits([1] * 12, list(range(12)))
    assert tokens.min() >= 0 and tokens.max() < 40 and len(tokens.unique(dim=0)) == 12
    for rows, candidates in (([1], [0]), ([1] * 2, [3, 4]), ([1] * 8, [*range(4, 12)]), ([2, 1, 0, 1], [0, 7, 0, 2])):
        own = [i for i, row in enumerate(rows) if row == 1]
        expected = [candidates[i] for i in own]
        again = tokens_and_logits(rows, candidates)
        assert torch.equal(again[0][own], tokens[expected]) and torch.equal(again[1][own], logits[expected])


@needs_int8
def test_int8_logits_of_a_row_are_the_same_bits_in_any_batch():
    int8 = converted(make_dalle(), "int8")
    tokens = torch.randint(0, 40, (33, 3), generator=torch.Generator().manual_seed(3))

    def steps(rows: int) -> torch.Tensor:
        cache = prefill(int8, texts(1)).cache.gather(torch.zeros(rows, dtype=torch.long), 43, share=False)
        return torch.stack([int8.step(tokens[:rows, i], i, cache) for i in range(3)], dim=1)

    expected = steps(33)
    for rows in (1, 2, 3, 8):
        assert torch.equal(steps(rows), expected[:rows]), rows


@needs_int8
def test_int8_weights_are_not_saved(tmp_path):
    with pytest.raises(UsageError, match="float32"):
        converted(make_dalle(), "int8").save_pretrained(tmp_path)


def test_bfloat16_has_weights_and_cache_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARED_LENGTH", 1)
    dalle = make_dalle(qk_norm=True)
    half = converted(dalle, "bfloat16")
    assert dtype_of(half) == "bfloat16" and dtype_of(dalle) == "float32"
    assert {weight.dtype for weight in half.transformer.parameters()} == {torch.bfloat16}
    assert half.transformer.rotary.dtype == torch.float32 and half.vae is dalle.vae
    prefix = prefill(half, texts(1))
    assert prefix.cache.layers[0].kv.keys.dtype == torch.bfloat16 and prefix.logits.dtype == torch.float32
    torch.testing.assert_close(prefix.logits, prefill(dalle, texts(1)).logits, rtol=0, atol=0.1)
    tokens = sample(half, [1] * 9, list(range(9)), 2.0)
    assert tokens.shape == (9, 36) and tokens.max() < 40


def test_float32_is_the_prior_itself():
    dalle = make_dalle()
    assert converted(dalle, "float32") is dalle


def test_auto_is_int8_for_large_layers_on_a_cpu(monkeypatch):
    dalle = make_dalle()
    assert choose_dtype(dalle, "cpu") == "float32"
    monkeypatch.setattr(dtypes, "MEAN_WEIGHTS", 1000)
    monkeypatch.setattr(dtypes, "has_int8", lambda: True)
    assert choose_dtype(dalle, "cpu") == "int8" and choose_dtype(dalle, "cuda") == "float32"
    monkeypatch.setattr(dtypes, "has_int8", lambda: False)
    assert choose_dtype(dalle, "cpu") == "float32"


def test_what_a_device_does_not_have_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="int8 is for CPUs; on cuda"):
        check_dtype("int8", torch.device("cuda"))
    with pytest.raises(UsageError, match="one of auto, float32, int8, bfloat16, got 'float16'"):
        check_dtype("float16", torch.device("cpu"))
    monkeypatch.setattr(dtypes, "has_int8", lambda: False)
    with pytest.raises(UsageError, match="FBGEMM"):
        check_dtype("int8", torch.device("cpu"))
    check_dtype("bfloat16", torch.device("cuda"))
