"""The training task of a VQGAN: reconstruction, with a codebook that follows the encoder and does not collapse.

Codes are drawn by the Gumbel-max trick from logits that are minus squared distances, at a temperature that falls to
zero (Jang et al. 2017); the gradient goes straight through (van den Oord et al. 2017). The codebook is not learned by
gradient: it is the moving average of the encodings that chose each code, starts from k-means, and a code that nothing
chooses any more is moved to an encoding, the sooner the farther that is from its code (Arthur and Vassilvitskii 2007):
a Gumbel quantizer whose projection is tied to its codebook.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_pytorch.data.loading import random_crops
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.training import codebook
from dalle_pytorch.training.losses import Adversary, PerceptualLoss
from dalle_pytorch.training.tasks.base import Batch, Loss, Preview, TrainingTask
from dalle_pytorch.vae.vqgan import GumbelQuantizer, VQGanVAE

PREVIEWS = 8  # images of a batch in a preview
NEWBORN = 0.2  # of the mean count: what a code that is moved starts with, to be used or moved again


class VQGanTask(TrainingTask):
    """The loss of a batch `image` (b, 3, h, w) uint8. `steps` counts the batches of the whole run.

    The first `warmup_steps` train a plain autoencoder, for k-means to start from; left out, they are 300, or a quarter
    of a short run. The temperature, `starting_temp` at first, is zero for the last 30 % of the steps.

    `crop_size` trains on token-aligned crops of that many pixels, a quarter of the work at half the side; the share
    `full_share` of the steps sees a part of the batch whole, so that the borders of an image are learned too.

    The adversary joins at the step `adversary_start`, left out half way, and comes to its full weight over a tenth of
    the steps: before there is an image, there is nothing to discriminate.
    """

    step: Tensor
    counts: Tensor  # (num_tokens,), moving average of how often each code was chosen
    sums: Tensor  # (num_tokens, dim), that of the sums of its encodings
    replicated = True  # the codebook is not learned by gradient, and every process writes all of it

    def __init__(self, vae: VQGanVAE, *, steps: int, crop_size: int | None = None, full_share: float = 0.25,
                 warmup_steps: int | None = None, starting_temp: float = 0.5, commitment_weight: float = 0.25,
                 gradient_weight: float = 1.0, codebook_decay: float = 0.99, adversary: Adversary | None = None,
                 adversary_start: int | None = None, perceptual: PerceptualLoss | None = None,
                 perceptual_weight: float = 1.0):  # fmt: skip
        super().__init__()
        self.vae, self.adversary, self.perceptual = vae, adversary, perceptual
        self.steps, self.crop_size, self.full_share = steps, crop_size, full_share
        self.warmup_steps = min(300, steps // 4) if warmup_steps is None else warmup_steps
        self.starting_temp = starting_temp
        self.adversary_start = steps // 2 if adversary_start is None else adversary_start
        self.commitment_weight, self.gradient_weight = commitment_weight, gradient_weight
        self.perceptual_weight, self.codebook_decay = perceptual_weight, codebook_decay
        for parameter in vae.quantize.parameters():
            parameter.requires_grad_(False)
        num_tokens, dim = vae.codebook_weight.shape
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("counts", torch.zeros(num_tokens))
        self.register_buffer("sums", torch.zeros(num_tokens, dim))

    def forward(self, batch: Batch) -> Loss:
        images = batch["image"].float() / 255
        side = images.shape[-1] // self.vae.downsampling
        (images,) = random_crops([images], self.crop_size, side, self.full_share)
        step = int(self.step)
        rows = z = self.vae.encode(images)
        loss: Tensor = z.new_zeros(())
        metrics: dict[str, Tensor | float] = {}
        if step >= self.warmup_steps:
            # Distances decide between codes, and half precision would not tell near ones apart.
            with torch.autocast(z.device.type, enabled=False):
                rows, loss, metrics = self._quantize(z.float(), step)
        output = self.vae.decode_embeddings(rows).float()
        error = output - images
        loss = loss + error.abs().mean() + 4 * error.square().mean() + self.gradient_weight * _gradient_error(error)
        metrics["psnr"] = -10 * torch.log10(error.detach().square().mean())
        if self.perceptual:
            perceptual = self.perceptual(images, output)
            loss = loss + self.perceptual_weight * perceptual
            metrics["perceptual"] = perceptual.detach()
        if self.adversary:
            strength = min(1.0, (step - self.adversary_start) / max(1, 0.1 * self.steps))
            if strength <= 0:
                adversarial = self.adversary.idle()
            else:
                adversarial, more = self.adversary(images, output, loss, strength)
                metrics |= more
            loss = loss + adversarial
        self.step += 1
        return loss, metrics

    def fixed_parts(self) -> dict[str, str]:
        return {"CLIP": self.perceptual.clip.fingerprint()} if self.perceptual else {}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"vae": self.vae}

    def compiled_parts(self) -> list[nn.Module]:
        assert self.vae.encoder is not None
        return [self.vae.encoder, self.vae.decoder]

    def preview(self, batch: Batch) -> Preview:
        """Each image over its reconstruction: from tokens, or while there is no codebook from the encoding."""
        images = batch["image"][:PREVIEWS].float() / 255
        if self.counts.any():
            output = self.vae.decode_image(self.vae.get_codebook_indices(images))
        else:
            output = self.vae.decode_embeddings(self.vae.encode(images)).clamp(0, 1)
        return {"reconstructions": torch.cat((images, output), dim=2)}

    def _quantize(self, z: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
        """The codes drawn for encodings (b, dim, h, w), with the encodings' gradient; a loss; metrics."""
        flat = rearrange(z.detach(), "b c h w -> (b h w) c")
        if not self.counts.any():
            self._start_codebook(flat)
        temperature = self._temperature(step)
        tokens = self._draw(flat, temperature)
        codes = rearrange(self.vae.codebook_weight[tokens], "(b h w) c -> b c h w", b=z.shape[0], h=z.shape[2])
        commitment = F.mse_loss(z, codes)
        self._follow(flat, tokens, step)
        metrics = {"commitment": commitment.detach(), "temperature": temperature, **codebook.codebook_use(self.counts)}
        return z + (codes - z).detach(), self.commitment_weight * commitment, metrics

    def _temperature(self, step: int) -> float:
        done = (step - self.warmup_steps) / max(1, 0.7 * (self.steps - self.warmup_steps))
        return self.starting_temp * (1 - min(1.0, done))

    def _draw(self, flat: Tensor, temperature: float) -> Tensor:
        """(n, dim) encodings → (n,) codes: the nearest, under Gumbel noise while the temperature is above 0."""
        logits = _closeness(flat, self.vae.codebook_weight)
        if temperature > 0:
            # In units of the mean squared distance to the nearest code: the setting means the same at any scale.
            unit = (flat.square().sum(1) - logits.max(1).values).clamp(min=0).mean()
            logits = logits - temperature * unit * torch.empty_like(logits).exponential_().log()
        return logits.argmax(1)

    @torch.no_grad()
    def _start_codebook(self, flat: Tensor, rounds: int = 10) -> None:
        """k-means over the encodings of all processes, each of which comes to the same centres."""
        centres = _pick(flat, len(self.counts))
        for _ in range(rounds):
            nearest = _closeness(flat, centres).argmax(1)
            counts = codebook.count_codes(nearest, len(centres))
            sums = _sums(flat, nearest, len(centres))
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], _pick(flat, len(centres)))
        if centres.isfinite().all():
            # Of equal centres only one is ever nearest, and the others count as unused from the first.
            nearest = _closeness(flat, centres).argmax(1)
            self.counts.copy_(codebook.count_codes(nearest, len(centres)).clamp(min=1e-5))
            self.sums.copy_(centres * self.counts[:, None])
            self._set_codebook(centres)

    @torch.no_grad()
    def _follow(self, flat: Tensor, tokens: Tensor, step: int) -> None:
        counts, sums = codebook.count_codes(tokens, len(self.counts)), _sums(flat, tokens, len(self.counts))
        if not sums.isfinite().all():
            return  # the loop will throw this step away; the codebook would remember it
        self.counts.lerp_(counts, 1 - self.codebook_decay)
        self.sums.lerp_(sums, 1 - self.codebook_decay)
        dead = codebook.unused_codes(self.counts)
        if dead.any() and step % 20 == 0 and step < 0.8 * self.steps:
            errors = (flat - self.vae.codebook_weight[tokens]).square().sum(1)
            count = NEWBORN * self.counts.mean()
            self.sums[dead] = _pick(flat, int(dead.sum()), errors) * count
            self.counts[dead] = count
        self._set_codebook(self.sums / self.counts.clamp(min=1e-5)[:, None])

    def _set_codebook(self, codes: Tensor) -> None:
        assert isinstance(self.vae.quantize, GumbelQuantizer)
        self.vae.quantize.set_codebook(codes)


def _closeness(flat: Tensor, codes: Tensor) -> Tensor:
    """Minus the squared distances (n, num_tokens) of encodings (n, dim) to codes, up to a term common to all codes."""
    return 2 * flat @ codes.T - codes.square().sum(1)


def _pick(flat: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """(count, dim) encodings at random, with `weights` (n,) or evenly: the same in all processes."""
    if weights is None or not weights.any():
        weights = flat.new_ones(len(flat))
    return codebook.from_first_process(flat[torch.multinomial(weights, count, replacement=True)])


def _sums(flat: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """The sums (num_tokens, dim) of the encodings of each code, over all processes."""
    return codebook.sum_over_processes(flat.new_zeros(num_tokens, flat.shape[1]).index_add_(0, tokens, flat))


def _gradient_error(error: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels: what a blurred edge costs."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
