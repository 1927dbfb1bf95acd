"""What a training uses and does not train is known by its content."""

import pytest
import torch
from factories import small_decoder

from dalle_pytorch.tokenizers.hug import train_bpe
from dalle_pytorch.tokenizers.load import load_tokenizer
from dalle_pytorch.training.commands.train_dalle import TrainDalleSettings
from dalle_pytorch.training.tasks.prior import DalleTask
from diffusion.tasks import DecoderTask


@pytest.fixture
def tokenizers(tmp_path):
    """Two of the same size, and the first once more."""
    for name, text in (("a", "red seven on brick " * 9), ("b", "der neves no kcirb " * 9)):
        train_bpe([text], 24).save(str(tmp_path / f"{name}.json"))
    return [load_tokenizer(tmp_path / f"{name}.json", hug=True) for name in "aba"]


def test_tokenizers_by_their_tokens(tokenizers):
    a, b, again = tokenizers
    assert a.vocab_size == b.vocab_size
    assert a.fingerprint() == again.fingerprint() != b.fingerprint()


def test_networks_by_their_weights(tiny_vae):
    first = tiny_vae.fingerprint()
    assert first == tiny_vae.fingerprint()
    with torch.no_grad():
        tiny_vae.codebook_weight[0, 0] += 1
    assert tiny_vae.fingerprint() != first


def test_parts_of_the_tasks(tiny_vae, tiny_bundle, tokenizers):
    from dalle_pytorch import load_dalle

    dalle = load_dalle(tiny_bundle / "dalle")
    expected = {"VAE": dalle.vae.fingerprint(), "tokenizer": tokenizers[0].fingerprint()}
    task = DalleTask.__new__(DalleTask)
    torch.nn.Module.__init__(task)
    task.dalle, task.tokenizer = dalle, tokenizers[0]
    assert task.fixed_parts() == expected
    assert DecoderTask(small_decoder(tiny_vae)).fixed_parts() == {"VAE": tiny_vae.fingerprint()}


def test_options_that_named_a_part():
    settings = TrainDalleSettings.parse(["--image_text_folder", "x", "--vae_path", "runs/a", "--taming"])
    assert settings.named("VAE") == "--vae_path runs/a --taming" and settings.named("tokenizer") == ""
