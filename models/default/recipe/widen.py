"""Carries the weights of the default model over to more words and other image tokens, for training to go on from.

    python models/default/recipe/widen.py --tokenizer_path tokenizer.json --vae_path runs/vqgan/vae

What a network knows of a text token that the new tokenizer has too is kept; a new one begins as the mean of the old
tokens that spell it. A new image token begins as the mean of the old tokens of the squares that it is found for, in
drawn scenes. All other weights are copied.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch import DALLE, load_dalle
from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.published.load import load_vae
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.tokenizers.hug import SPACE, HugTokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE
from diffusion import DiffusionDecoder
from diffusion.unet import UNet

MODEL = Path(__file__).resolve().parents[1]


@dataclass
class WidenSettings(Settings):
    __doc__ = __doc__

    tokenizer_path: Path = option(help="the new tokenizer.json")
    vae_path: Path | None = option(None, "the new VQGAN: without it, only CLIP is made")
    model_path: Path = option(MODEL, "folder of dalle, clip, decoder, vae and tokenizer.json")
    output_dir: Path = option(Path("runs/widened"), "where clip, dalle and decoder go")
    of: str = option("everything", "the scenes that image tokens are compared on", choices=glyphs.MIXTURES)
    count: int = option(4000, "how many of them", low=1)


def spelled_rows(rows: Tensor, old: HugTokenizer, new: HugTokenizer) -> Tensor:
    """The rows (new.vocab_size, dim) of the new tokens, from those (old.vocab_size, dim) of the old ones."""
    result = torch.empty(new.vocab_size, rows.shape[1])
    for token, index in new.tokenizer.get_vocab().items():
        same = old.tokenizer.token_to_id(token)
        # The first space of a text is added by the tokenizer.
        spelled = [same] if same is not None else old.encode(token.replace(SPACE, " "))
        result[index] = rows[spelled].mean(0)
    return result


@torch.no_grad()
def shared_squares(old: VQGanVAE, new: VQGanVAE, of: str, count: int) -> Tensor:
    """(new.num_tokens, old.num_tokens) float: how often an old token is that of a square of which the new one is."""
    pairs = torch.zeros(new.num_tokens * old.num_tokens)
    for start in range(0, count, 50):
        scenes = [glyphs.make_scene(index, of=of) for index in range(start, min(start + 50, count))]
        images = images_of(scenes, old.image_size)
        old_tokens, new_tokens = (vae.get_codebook_indices(images).flatten() for vae in (old, new))
        found, times = (new_tokens * old.num_tokens + old_tokens).unique(return_counts=True)
        pairs[found] += times
    return pairs.unflatten(0, (new.num_tokens, old.num_tokens))


def mean_rows(rows: Tensor, pairs: Tensor) -> Tensor:
    """The means (new, dim) of the old rows (old, dim) that go with each new one, by `pairs` (new, old); of all, where
    none do."""
    total = pairs.sum(1, keepdim=True)
    return torch.where(total > 0, pairs @ rows / total.clamp(min=1), pairs.sum(0) @ rows / pairs.sum())


@torch.no_grad()
def widen_clip(clip: CLIP, old: HugTokenizer, new: HugTokenizer) -> CLIP:
    config: dict[str, Any] = {**clip.config, "num_text_tokens": new.vocab_size}
    wide = CLIP(**config)
    state = clip.state_dict()
    state["text_emb.weight"] = spelled_rows(state["text_emb.weight"], old, new)
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def widen_prior(prior: DALLE, vae: VQGanVAE, pairs: Tensor, old: HugTokenizer, new: HugTokenizer) -> DALLE:
    config: dict[str, Any] = {**prior.config, "num_text_tokens": new.vocab_size, "num_image_tokens": vae.num_tokens}
    wide = DALLE(vae=vae, **config)
    state = {name: tensor for name, tensor in prior.state_dict().items() if not name.startswith("vae.")}
    text = prior.num_text_tokens - prior.text_seq_len  # after these follow a padding token for each position

    def rows(tensor: Tensor) -> Tensor:
        return torch.cat((spelled_rows(tensor[:text], old, new), tensor[text : prior.num_text_tokens]))

    state["text_emb.weight"] = rows(state["text_emb.weight"])
    state["image_emb.weight"] = mean_rows(state["image_emb.weight"], pairs)
    weight, bias = state["to_logits.weight"], state["to_logits.bias"][:, None]
    first = prior.num_text_tokens
    state["to_logits.weight"] = torch.cat((rows(weight), mean_rows(weight[first:], pairs)))
    # Tokens that share the squares of one share its probability.
    share = (pairs / pairs.sum(0).clamp(min=1)).amax(1, keepdim=True).clamp(min=1e-2).log()
    state["to_logits.bias"] = torch.cat((rows(bias), mean_rows(bias[first:], pairs) + share))[:, 0]
    state |= {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def widen_decoder(decoder: DiffusionDecoder, vae: VQGanVAE, pairs: Tensor) -> DiffusionDecoder:
    """The decoder, for which new codes are mapped linearly to where they are nearest to the old ones."""
    weights = pairs.sum(1, keepdim=True).sqrt()
    codes = torch.cat((vae.codebook_weight, torch.ones(vae.num_tokens, 1)), dim=1)
    old_codes = mean_rows(decoder.vae.codebook_weight, pairs)
    *matrix, offset = torch.linalg.lstsq(codes * weights, old_codes * weights).solution
    network = {name: value for name, value in decoder.unet.config.items() if name != "emb_input_dims"}
    wide = DiffusionDecoder(UNet(emb_input_dims=vae.codebook_dim, **network), vae, **asdict(decoder.settings))
    state = decoder.unet.state_dict()
    weight, bias = "external_block.op.weight", "external_block.op.bias"
    state[bias] = state[bias] + torch.einsum("ochw,c->o", state[weight], offset)
    state[weight] = torch.einsum("ochw,nc->onhw", state[weight], torch.stack(matrix))
    wide.unet.load_state_dict(state)
    return wide


def main(argv: Sequence[str] | None = None) -> None:
    settings = WidenSettings.parse(argv)
    folder, output_dir = settings.model_path, settings.output_dir
    old, new = HugTokenizer(folder / "tokenizer.json"), HugTokenizer(settings.tokenizer_path)
    widen_clip(CLIP.from_pretrained(folder / "clip"), old, new).save_pretrained(output_dir / "clip")
    shutil.copy(settings.tokenizer_path, output_dir / "tokenizer.json")
    if settings.vae_path is None:
        return
    prior, decoder = load_dalle(folder / "dalle"), DiffusionDecoder.from_pretrained(folder / "decoder")
    vae = load_vae(settings.vae_path)
    assert isinstance(prior.vae, VQGanVAE) and isinstance(vae, VQGanVAE)
    pairs = shared_squares(prior.vae, vae, settings.of, settings.count)
    widen_prior(prior, vae, pairs, old, new).save_pretrained(output_dir / "dalle")
    widen_decoder(decoder, vae, pairs).save_pretrained(output_dir / "decoder")
    vae.save_pretrained(output_dir / "vae")


if __name__ == "__main__":
    run(main)
