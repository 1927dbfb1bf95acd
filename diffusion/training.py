"""What a diffusion decoder is trained on: pictures under noise, and the tokens that a VAE finds in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_pytorch.data import random_crops
from dalle_pytorch.files import resize
from diffusion.decoder import DiffusionDecoder


class DecoderTask(nn.Module):
    """A batch of pictures at the decoder's size to a loss; the VAE reads them at its own.

    `crop_size` trains on squares of that many pixels, cut along the token grid together with their part of what the
    network is told: a quarter of the work at half the side. The share `full_share` of the steps sees a part of the
    batch whole instead, so that the network knows a picture's borders from a crop's.
    """

    def __init__(self, decoder: DiffusionDecoder, crop_size: int | None = None, full_share: float = 0.25):
        super().__init__()
        self.decoder = decoder
        self.crop_size, self.full_share = crop_size, full_share
        decoder.vae.requires_grad_(False)

    def train(self, mode: bool = True) -> DecoderTask:
        super().train(mode)
        self.decoder.vae.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch["image"]` (b, 3, h, w) uint8 → the mean loss, and figures to log."""
        pictures = batch["image"].float() / 255
        with torch.no_grad():
            tokens = self.decoder.vae.get_codebook_indices(resize(pictures, self.decoder.vae.image_size))
            conditioning = self.decoder.conditioning(tokens)
        maps = [pictures * 2 - 1, *conditioning.values()]
        pictures, *maps = random_crops(maps, self.crop_size, round(tokens.shape[1] ** 0.5), self.full_share)
        conditioning = dict(zip(conditioning, maps, strict=True))
        denoiser = self.decoder.denoiser.conditioned(**conditioning)
        step = torch.randint(denoiser.num_steps, (len(pictures),))
        loss = denoiser.loss(pictures, step, torch.randn_like(pictures))
        late = step >= denoiser.num_steps // 2
        halves = {"loss_noisy": loss.detach()[late], "loss_clear": loss.detach()[~late]}
        return loss.mean(), {name: half.mean() for name, half in halves.items() if len(half)}
