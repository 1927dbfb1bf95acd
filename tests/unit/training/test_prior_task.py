"""The prior's training task: which captions are dropped, which image tokens are noisy, and what is predicted."""

import pytest
import torch
import torch.nn.functional as F
from factories import Letters

from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.training.tasks.prior import DalleTask, code_features
from dalle_pytorch.vae.discrete import DiscreteVAE


@pytest.fixture
def dalle():
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=4)
    return DALLE(vae=vae, dim=16, num_text_tokens=30, text_seq_len=4, depth=1, heads=1, dim_head=16)


def make_batch(count):
    tokens = torch.randint(40, (count, 16), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "caption": ["abc"] * count}


def recorded(dalle, name, monkeypatch):
    """The first argument of every call of a method of `dalle`."""
    seen, method = [], getattr(dalle, name)
    monkeypatch.setattr(dalle, name, lambda first, *rest: seen.append(first) or method(first, *rest))
    return seen


def test_dropped_captions_are_empty_ones(dalle):
    batch = make_batch(3)
    loss, _ = DalleTask(dalle, Letters(), null_cond_prob=1.0)(batch)
    empty = torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(loss, dalle(empty, batch["tokens"], return_loss=True))
    kept, _ = DalleTask(dalle, Letters(), null_cond_prob=0.0)(batch)
    assert torch.equal(kept, dalle(Letters().tokenize(batch["caption"], 4), batch["tokens"], return_loss=True))


def test_share_of_captions_is_dropped_whole(dalle, monkeypatch):
    texts = recorded(dalle, "prepare_text", monkeypatch)
    torch.manual_seed(0)
    with torch.no_grad():
        DalleTask(dalle, Letters(), null_cond_prob=0.25)(make_batch(2000))
    empty = (texts[0] == 0).all(dim=1)
    assert empty.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(texts[0][~empty], torch.tensor([[1, 2, 3, 0]]).expand(int((~empty).sum()), -1))


def test_image_noise_replaces_a_share_of_the_tokens_shown_and_none_of_those_predicted(dalle, monkeypatch):
    batch, task = make_batch(1000), DalleTask(dalle, Letters(), null_cond_prob=0, image_noise=0.6)
    tokens, shown = batch["tokens"], recorded(dalle, "embed_image", monkeypatch)
    torch.manual_seed(0)
    with torch.no_grad():
        loss, _ = task(batch)
        (noisy,) = shown
        replaced = noisy != tokens
        # The token at the same place of the image before it in the batch.
        assert torch.equal(noisy[replaced], tokens.roll(1, 0)[replaced])
        # A share that is uniform in [0, 0.6]: 0.3 on average, of which one in 40 is replaced by its like.
        assert replaced.float().mean().item() == pytest.approx(0.3 * 39 / 40, abs=0.02)
        shares = replaced.float().mean(dim=1)
        assert (shares < 0.1).float().mean() > 0.1 and (shares > 0.5).float().mean() > 0.1

        text = Letters().tokenize(batch["caption"], 4)
        logits, words = dalle(text, noisy), dalle.num_text_tokens
        text_loss = F.cross_entropy(logits[:, :4, :words].transpose(1, 2), dalle.prepare_text(text)[:, 1:])
        image_loss = F.cross_entropy(logits[:, 4:, words:].transpose(1, 2), tokens)
    torch.testing.assert_close(loss, (text_loss + 7 * image_loss) / 8)


def test_features_are_alike_for_codes_that_are_alike():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(400, 8, generator=generator)
    codes[1] = codes[0] + 0.01 * torch.randn(8, generator=generator)
    features = code_features(codes)
    assert features.shape == (400, 256 + 8) and torch.equal(features, code_features(codes))
    distance = torch.cdist(features[:1], features)[0]
    assert int(distance[1:].argmin()) == 0 and distance[1] < 0.1 * distance[2:].min()
    # The scale of a codebook is its own affair.
    torch.testing.assert_close(code_features(100 * codes + 5), features, atol=1e-3, rtol=1e-3)


def test_rows_of_image_tokens_are_shared_and_none_of_words(dalle):
    assert DalleTask(dalle, Letters()).shared_rows() == []
    outputs, inputs = DalleTask(dalle, Letters(), share_codes=True).shared_rows()
    assert outputs.weight is dalle.to_logits.weight and inputs.weight is dalle.image_emb.weight
    assert len(outputs.features) == len(inputs.features) == 40
    tied = DALLE(vae=dalle.vae, dim=16, num_text_tokens=30, text_seq_len=4, depth=1, heads=1, dim_head=16,
                 share_input_output_emb=True)  # fmt: skip
    (both,) = DalleTask(tied, Letters(), share_codes=True).shared_rows()
    assert both.weight is tied.to_logits.weight
