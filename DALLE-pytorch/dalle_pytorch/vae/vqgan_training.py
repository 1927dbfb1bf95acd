"""What a VQGAN is trained on: reconstruction, with a codebook that follows the encoder and does not collapse.

Codes are drawn by the Gumbel-max trick from logits that are minus squared distances, at a temperature that falls to
zero (Jang et al. 2017); the gradient goes straight through (van den Oord et al. 2017). The codebook is not learned by
gradient: it is the running mean of the encodings that chose each code, it starts from k-means, and a code that nobody
chooses any more is moved to an encoding at random: a Gumbel quantizer whose projection is tied to its codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_pytorch.data import random_crops
from dalle_pytorch.vae.vqgan import VQGanVAE


class VQGanTask(nn.Module):
    """A batch of pictures to a loss. The first `warmup_steps` train a plain autoencoder, for k-means to start from.

    `crop_size` trains on token-aligned crops of that many pixels, a quarter of the work at half the side; the share
    `full_share` of the steps sees a part of the batch whole, so that the borders of a picture are learned too.
    """

    def __init__(
        self,
        vae: VQGanVAE,
        *,
        steps: int,
        crop_size: int | None = None,
        full_share: float = 0.25,
        warmup_steps: int = 300,
        start_temperature: float = 0.5,
        commitment_weight: float = 0.25,
        gradient_weight: float = 1.0,
        codebook_decay: float = 0.99,
    ):
        super().__init__()
        self.vae = vae
        self.steps, self.crop_size, self.full_share, self.warmup_steps = steps, crop_size, full_share, warmup_steps
        self.start_temperature, self.commitment_weight = start_temperature, commitment_weight
        self.gradient_weight, self.codebook_decay = gradient_weight, codebook_decay
        for parameter in vae.quantize.parameters():
            parameter.requires_grad_(False)
        num_tokens, dim = vae.codebook.shape
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("counts", torch.zeros(num_tokens))
        self.register_buffer("sums", torch.zeros(num_tokens, dim))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"].float() / 255
        side = images.shape[-1] // self.vae.downsampling
        (images,) = random_crops([images], self.crop_size, side, self.full_share)
        z = self.vae.encode(images)
        figures = {}
        commitment = z.new_zeros(())
        rows = z
        if self.step >= self.warmup_steps:
            flat = rearrange(z.detach(), "b c h w -> (b h w) c").float()
            if not self.counts.any():
                self._start_codebook(flat)
            tokens = self._draw(flat)
            codes = rearrange(self.vae.codebook[tokens], "(b h w) c -> b c h w", b=z.shape[0], h=z.shape[2])
            commitment = F.mse_loss(z, codes)
            rows = z + (codes - z).detach()
            self._follow(flat, tokens)
            share = self.counts / self.counts.sum()
            figures["perplexity"] = torch.exp(-(share * share.clamp(min=1e-9).log()).sum())
        output = self.vae.decode_embeddings(rows)
        error = output - images
        loss = error.abs().mean() + 4 * error.square().mean() + self.gradient_weight * _gradient_error(error)
        figures |= {"psnr": -10 * torch.log10(error.detach().square().mean()), "commitment": commitment.detach()}
        self.step += 1
        return loss + self.commitment_weight * commitment, figures

    def _draw(self, flat: Tensor) -> Tensor:
        """(n, dim) encodings → (n,) codes: the nearest, under Gumbel noise while the temperature is above 0."""
        codes = self.vae.codebook
        logits = 2 * flat @ codes.T - codes.square().sum(1)
        done = (self.step - self.warmup_steps) / max(1, 0.7 * (self.steps - self.warmup_steps))
        temperature = self.start_temperature * float(1 - done.clamp(max=1))
        if temperature > 0:
            # In units of the mean squared distance to the nearest code: the setting means the same at any scale.
            unit = (flat.square().sum(1) - logits.max(1).values).clamp(min=0).mean()
            logits = logits - temperature * unit * torch.empty_like(logits).exponential_().log()
        return logits.argmax(1)

    @torch.no_grad()
    def _start_codebook(self, flat: Tensor, rounds: int = 10) -> None:
        centres = flat[torch.randperm(len(flat), device=flat.device)[: len(self.counts)]].clone()
        if len(centres) < len(self.counts):
            raise ValueError(f"a batch gives {len(flat)} encodings, too few to start a codebook of {len(self.counts)}")
        for _ in range(rounds):
            nearest = (2 * flat @ centres.T - centres.square().sum(1)).argmax(1)
            counts = torch.bincount(nearest, minlength=len(centres)).to(flat.dtype)
            sums = torch.zeros_like(centres).index_add_(0, nearest, flat)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], _pick(flat, len(centres)))
        self.counts.fill_(1.0)
        self.sums.copy_(centres)
        self.vae.quantize.set_codebook(centres)

    @torch.no_grad()
    def _follow(self, flat: Tensor, tokens: Tensor) -> None:
        decay = self.codebook_decay
        counts = torch.bincount(tokens, minlength=len(self.counts)).to(flat.dtype)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, tokens, flat), 1 - decay)
        dead = self.counts < 0.05 * self.counts.mean()
        if dead.any() and self.step % 20 == 0 and self.step < 0.8 * self.steps:
            self.sums[dead] = _pick(flat, int(dead.sum())) * self.counts.mean()
            self.counts[dead] = self.counts.mean()
        self.vae.quantize.set_codebook(self.sums / self.counts.clamp(min=1e-5)[:, None])


def _pick(flat: Tensor, count: int) -> Tensor:
    return flat[torch.randint(len(flat), (count,), device=flat.device)]


def _gradient_error(error: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels: what a blurred edge costs."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
