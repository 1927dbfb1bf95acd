"""Tiny models, untrained and always the same."""

import torch

from dalle_pytorch.clip.trainable import CLIP
from diffusion import DiffusionDecoder, UNet
from diffusion.denoiser import Denoiser
from diffusion.schedule import Schedule


class Letters:
    """A tokenizer of one token a letter, a to z from 1, that pads with 0."""

    def __init__(self, vocab_size: int = 27):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [ord(letter) - 96 for letter in text]

    def decode(self, tokens):
        return "".join(chr(96 + token) for token in tokens)

    def tokenize(self, texts, context_length, truncate_text=False):
        rows = [self.encode(text)[:context_length] for text in ([texts] if isinstance(texts, str) else texts)]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def small_unet(**settings):
    """Untrained, but with no zeroed layer left: what is not computed would not show otherwise."""
    torch.manual_seed(0)
    defaults = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1)}
    unet = UNet(**{**defaults, **settings}).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return unet


def small_decoder(vae, **settings):
    unet = small_unet(image_size=128, patch_size=4, emb_condition=True, emb_input_dims=vae.codebook_dim,
                      emb_output_dims=32, emb_stride=1, low_res_condition=True)  # fmt: skip
    return DiffusionDecoder(unet, vae, **{"predict_xstart": True, "rescale_timesteps": True, **settings}).eval()


def gaussian_denoiser(mean=0.3, deviation=0.2, steps="20", schedule="linear", **settings):
    """E[eps | x] where pixels are normal: what a network would learn of them."""
    schedule = Schedule.named(schedule, 1000)
    alpha_bar = schedule.alphas_cumprod.float()

    def network(x, timesteps):
        a = alpha_bar[timesteps.long()][:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    return Denoiser(network, schedule, **settings).respaced(steps)


def make_clip(**options) -> CLIP:
    torch.manual_seed(0)
    sizes = {"dim_text": 24, "dim_image": 24, "dim_latent": 16, "num_text_tokens": 30, "text_seq_len": 6,
             "text_enc_depth": 1, "text_heads": 2, "visual_enc_depth": 1, "visual_heads": 2, "visual_image_size": 16,
             "visual_patch_size": 4, "text_dim_head": 8, "visual_dim_head": 8}  # fmt: skip
    return CLIP(**{**sizes, **options})


def clip_batch():
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 27, (3, 6), generator=generator)
    text[:, 4:] = 0
    return text, torch.rand(3, 3, 16, 16, generator=generator)
