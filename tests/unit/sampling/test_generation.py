"""The candidates of a prompt: reproducible, ranked, and no more of them in memory than are kept."""

import copy
import math

import pytest
import torch
from factories import Letters

from dalle_pytorch.errors import SamplingDiverged
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling.candidates import candidate_batches, generate_candidates
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.vae.discrete import DiscreteVAE


class Brightness:
    """Scores pictures by how bright they are, in steps, so that some are equal."""

    def score(self, prompt, images):
        assert prompt == "ab"
        return (images.mean(dim=(1, 2, 3)) * 200).round() / 200


@pytest.fixture(scope="module")
def dalle():
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=8)
    dalle = DALLE(dim=32, vae=vae, num_text_tokens=30, text_seq_len=6, depth=2, heads=2, dim_head=16)
    dalle.tokenizer = Letters()
    return dalle.double().eval()


def generate(dalle, num_images=10, top_k=None, top_p=None, temperature=1.0, cond_scale=1.0, **options):
    settings = SamplingSettings(top_k, top_p, temperature, cond_scale)
    return generate_candidates(dalle, "ab", num_images, settings=settings, **options)


def test_candidates_do_not_depend_on_batches_or_their_number(dalle):
    expected = generate(dalle, batch_size=10)
    assert [candidate.index for candidate in expected] == list(range(10))
    assert len({tuple(candidate.tokens.tolist()) for candidate in expected}) == 10
    for settings in ({"batch_size": 3}, {"batch_size": 1, "num_images": 4}, {"num_images": 12, "keep": 10}):
        for candidate, other in zip(expected, generate(dalle, **settings), strict=False):
            assert candidate.index == other.index and torch.equal(candidate.tokens, other.tokens)
            torch.testing.assert_close(candidate.image, other.image)
    assert not torch.equal(generate(dalle, seed=1)[0].tokens, expected[0].tokens)


def test_picture_is_that_of_the_tokens(dalle):
    candidate = generate(dalle, num_images=2)[1]
    assert candidate.tokens.shape == (16,) and candidate.tokens.dtype == torch.int64
    assert candidate.image.shape == (3, 16, 16) and candidate.image.dtype == torch.float32
    torch.testing.assert_close(candidate.image, dalle.vae.decode_image(candidate.tokens[None])[0].float())


def test_best_first_and_earlier_of_equals_first(dalle):
    everything = generate(dalle, num_images=40, scorer=Brightness())
    order = [(-candidate.score, candidate.index) for candidate in everything]
    assert order == sorted(order) and len({score for score, _ in order}) < 40
    for batch_size in (1, 7, 40):
        best = generate(dalle, num_images=40, scorer=Brightness(), keep=5, batch_size=batch_size)
        assert [candidate.index for candidate in best] == [index for _, index in order[:5]]


def test_only_what_is_kept_is_drawn_without_a_scorer(dalle):
    calls = []
    kept = generate(dalle, num_images=1000, keep=3, batch_size=2, progress=lambda *call: calls.append(call))
    assert [candidate.index for candidate in kept] == [0, 1, 2] and kept[0].score is None
    assert calls == [(start, drawn + 1) for start in (0, 2) for drawn in range(16)]


def test_kept_candidates_do_not_hold_on_to_their_batch(dalle):
    for candidate in generate(dalle, num_images=8, keep=2, scorer=Brightness()):
        assert candidate.image.untyped_storage().nbytes() == candidate.image.nbytes
        assert candidate.tokens.untyped_storage().nbytes() == candidate.tokens.nbytes


def test_prompt_is_run_once(dalle, monkeypatch):
    lengths = []
    forward = dalle.transformer.forward
    monkeypatch.setattr(
        dalle.transformer, "forward", lambda x, cache=None: lengths.append(x.shape[1]) or forward(x, cache=cache)
    )
    generate(dalle, num_images=6, batch_size=2, cond_scale=2.0)
    assert lengths == [7] + [1] * 45


def test_candidates_begin_with_given_tokens(dalle):
    given = torch.arange(8)
    for candidate in generate(dalle, num_images=3, init_image_tokens=given):
        assert torch.equal(candidate.tokens[:8], given)


def test_generate_images_draws_the_same_candidate(dalle):
    text = Letters().tokenize("ab", 6)
    tokens = dalle.generate_images(text.expand(3, -1), top_p=0.9, seed=4, return_tokens=True)[1]
    for candidate in generate(dalle, num_images=3, top_p=0.9, seed=4):
        assert torch.equal(candidate.tokens, tokens[candidate.index])


@pytest.mark.parametrize("settings", [
    {"num_images": 0}, {"batch_size": 0}, {"keep": 0}, {"top_p": 0}, {"top_k": -2}, {"temperature": -1},
    {"cond_scale": float("nan")}, {"init_image_tokens": torch.zeros(16, dtype=torch.long)},
])  # fmt: skip
def test_settings_out_of_range(dalle, settings):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        generate(dalle, **settings)


@pytest.mark.parametrize("part, what", [("to_logits", "logits of the prior"), ("vae", "pixels")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_not_finite_stops(dalle, part, what, temperature):
    dalle = copy.deepcopy(dalle)
    for parameter in getattr(dalle, part).parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(SamplingDiverged, match=what):
        generate(dalle, num_images=3, temperature=temperature)


def test_batches_come_one_at_a_time(dalle):
    drawn = []
    batches = candidate_batches(dalle, "ab", 6, batch_size=2, progress=lambda *call: drawn.append(call))
    first = next(batches)
    assert [candidate.index for candidate in first] == [0, 1] and len(drawn) == 16
