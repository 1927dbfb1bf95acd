"""The training task of a DiscreteVAE: its own loss, at a temperature that falls as in DALLE-pytorch."""

import math

import torch
from torch import Tensor

from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.training.codebook import codebook_use, count_codes
from dalle_pytorch.training.tasks.base import Batch, Loss, Preview, TrainingTask
from dalle_pytorch.vae.discrete import DiscreteVAE

ANNEAL_EVERY = 100  # steps
COUNT_EVERY = 10  # steps: counting the likeliest codes runs the encoder once more
COUNT_DECAY = 0.9


class DiscreteVAETask(TrainingTask):
    """The VAE's loss of a batch `image` (b, channels, h, w) uint8.

    Every 100 steps the temperature, `starting_temp` at first, is multiplied by exp(−`anneal_rate` · step), down to
    `temp_min`. That is DALLE-pytorch's rule: at its rate of 1e-6 the temperature halves in 11,800 steps.
    """

    step: Tensor
    counts: Tensor

    def __init__(self, vae: DiscreteVAE, *, starting_temp: float = 1.0, temp_min: float = 0.5,
                 anneal_rate: float = 1e-6, num_images_save: int = 4):  # fmt: skip
        super().__init__()
        self.vae = vae
        self.starting_temp, self.temp_min, self.anneal_rate = starting_temp, temp_min, anneal_rate
        self.num_images_save = num_images_save
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("counts", torch.zeros(vae.num_tokens))

    @property
    def temperature(self) -> float:
        """The temperature of the next step."""
        times = int(self.step) // ANNEAL_EVERY
        exponent = self.anneal_rate * ANNEAL_EVERY * times * (times + 1) / 2  # the sum of the steps it was lowered at
        return max(self.starting_temp * math.exp(-exponent), self.temp_min)

    def forward(self, batch: Batch) -> Loss:
        images = batch["image"].float() / 255
        temperature = self.temperature
        if self.step % COUNT_EVERY == 0:
            counts = count_codes(self.vae.get_codebook_indices(images), self.vae.num_tokens)
            self.counts.lerp_(counts, 1 - COUNT_DECAY if self.counts.any() else 1.0)
        loss, output = self.vae(images, return_loss=True, return_recons=True, temp=temperature)
        error = self._to_unit(output.detach().float()) - images
        self.step += 1
        psnr = -10 * torch.log10(error.square().mean())
        return loss, {"psnr": psnr, "temperature": temperature, **codebook_use(self.counts)}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"vae": self.vae}

    def preview(self, batch: Batch) -> Preview:
        """Each image over its reconstruction from codes drawn as in training, over that from its tokens."""
        images = batch["image"][: self.num_images_save].float() / 255
        drawn = self._to_unit(self.vae(images, temp=self.temperature)).clamp(0, 1)
        hard = self.vae.decode_image(self.vae.get_codebook_indices(images))
        return {"reconstructions": torch.cat([_over_white(rows) for rows in (images, drawn, hard)], dim=2)}

    def _to_unit(self, output: Tensor) -> Tensor:
        return output * self.vae.std + self.vae.mean


def _over_white(images: Tensor) -> Tensor:
    """(b, 3, h, w) of images with an alpha channel (b, 4, h, w) or without."""
    if images.shape[1] == 3:
        return images
    colour, alpha = images[:, :3], images[:, 3:]
    return colour * alpha + 1 - alpha
