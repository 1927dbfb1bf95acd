"""The diffusion decoder: image tokens in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_pytorch.checkpoints import CheckpointError, PretrainedModel, companion_path, records_config
from dalle_pytorch.vae.vqgan import VQGanVAE  # noqa: F401  the class that a folder's companion usually is
from diffusion.denoiser import Denoiser, Schedule
from diffusion.guidance import Guidance
from diffusion.samplers import SAMPLERS, Noise, generator
from diffusion.unet import UNet


class DiffusionDecoder(PretrainedModel):
    """Draws the picture of a grid of image tokens by diffusion, in place of the VAE's own decoder.

    The U-Net is told the tokens by their codebook rows, by the picture that the VAE decodes from them, or by both; its
    configuration says which. The remaining arguments, under guidance-diffusion's names, are how it was trained.
    On disk it is one folder; the VAE is a folder `vae` in it or beside it.
    """

    @records_config
    def __init__(
        self,
        unet: UNet | Mapping[str, Any],
        vae: nn.Module,
        diffusion_steps: int = 1000,
        noise_schedule: str = "linear",
        predict_xstart: bool = False,
        sigma_small: bool = False,
        rescale_timesteps: bool = False,
    ):
        super().__init__()
        self.unet = unet if isinstance(unet, UNet) else UNet(**unet)
        self.vae = vae
        self.denoiser = Denoiser(
            self.unet,
            Schedule.named(noise_schedule, diffusion_steps),
            predict_xstart=predict_xstart,
            learn_sigma=self.unet.learn_sigma,
            sigma_small=sigma_small,
            rescale_timesteps=rescale_timesteps,
        )
