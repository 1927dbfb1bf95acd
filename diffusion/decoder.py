"""The diffusion decoder: image tokens in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.pretrained import PretrainedModel, companion_path, records_config
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClipGuidance
from diffusion.samplers import SAMPLERS, Noise, generator
from diffusion.schedule import Schedule
from diffusion.unet import UNet


class DiffusionDecoder(PretrainedModel):
    """Draws the picture of a grid of image tokens by diffusion, in place of the VAE's own decoder.

    The U-Net is told the tokens by their codebook rows, by the picture that the VAE decodes from them, or by both; its
    configuration says which. The remaining arguments are how it was trained: guided-diffusion's names, and the
    `residual_std` of `Denoiser`.
    On disk it is one folder, with its VAE in a folder `vae` inside or beside it. Raises `ValueError` if that does not
    fit.
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
        residual_std: float | None = None,
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
            residual_std=residual_std,
            gated=self.unet.gated,
        )
        settings = self.unet.config
        if residual_std is not None and not settings["low_res_condition"]:
            raise ValueError("residuals are of a picture that the U-Net is told: residual_std wants low_res_condition")
        if not (settings["emb_condition"] or settings["low_res_condition"]):
            raise ValueError("this U-Net draws pictures of its own, not those of tokens: it is conditioned on none")
        if settings["emb_condition"]:
            wanted = settings["emb_input_dims"]
            channels = vae.embed(torch.zeros(1, 1, dtype=torch.long, device=next(vae.parameters()).device)).shape[1]
            if channels != wanted:
                raise ValueError(f"this U-Net takes codes of {wanted} channels, and those of its VAE have {channels}")

    @property
    def config(self) -> dict[str, Any]:
        """The settings, those of the U-Net among them however it was given."""
        return {"unet": self.unet.config, **self._settings}

    @config.setter
    def config(self, settings: dict[str, Any]) -> None:
        self._settings = {name: value for name, value in settings.items() if name != "unet"}

    def own_state_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("vae.")}

    @classmethod
    def companions(cls, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        if "vae" in overrides:
            return {}
        path = companion_path(folder, "vae")
        if path is None:
            raise CheckpointError(f"{folder} has no VAE: there is no folder vae in it or beside it")
        return {"vae": PretrainedModel.from_pretrained(path)}

    def conditioning(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the network is told of (b, side²) tokens: `image_embeds` and `low_res`, as far as it wants them."""
        conditioning = {}
        if self.unet.config["emb_condition"]:
            conditioning["image_embeds"] = self.vae.embed(tokens)
        if self.unet.config["low_res_condition"]:
            conditioning["low_res"] = self.vae.decode_image(tokens) * 2 - 1
        return conditioning

    @property
    def image_fmap_size(self) -> int:
        """Side of the token grid that a picture of the U-Net's `image_size` is drawn from."""
        if self.unet.config["emb_condition"]:
            return self.unet.image_size // self.unet.downscale * self.unet.emb_stride
        return self.vae.image_size // 2**self.vae.num_layers

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        steps: str | int | Iterable[int] = "quad25",
        sampler: str = "ddim",
        seed: int = 0,
        images: Sequence[int] | None = None,
        guidance: ClipGuidance | None = None,
        stop_at: int | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """(b, side²) int64 tokens → pictures (b, 3, h, w) in [0, 1]. Another grid side makes a picture in proportion.

        `steps` is how many diffusion steps to visit, in any of the ways of `spaced_steps`; `sampler` one of `SAMPLERS`.
        A picture's noise, and its cutouts under `guidance`, are fixed by the seed, its tokens and which of several
        `images` of them it is (0 unless given), whatever else is in the batch. `stop_at` ends after so many steps, with
        the picture predicted by then; `callback(done, pictures)` sees that prediction, in [0, 1], after every step.
        Raises `ValueError` for a sampler or spacing that is not known.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown: {', '.join(SAMPLERS)} are there")
        denoiser = self.denoiser.respaced(steps).conditioned(**self.conditioning(tokens))
        stop_at = denoiser.num_steps if stop_at is None else stop_at
        if not 1 <= stop_at <= denoiser.num_steps:
            raise ValueError(f"cannot stop at step {stop_at} of {denoiser.num_steps}")

        images = [0] * len(tokens) if images is None else images
        identities = [(seed, tuple(row), image) for row, image in zip(tokens.tolist(), images, strict=True)]
        size = round(tokens.shape[1] ** 0.5) * self.unet.image_size // self.image_fmap_size
        noise = Noise([generator(*identity) for identity in identities], (3, size, size), tokens.device)
        guide = guidance.guide(identities) if guidance else None
        run = SAMPLERS[sampler](denoiser, noise(), noise, guide)
        for done, (_, x, x_0) in enumerate(islice(run, stop_at), 1):
            pictures = to_unit(x if done == denoiser.num_steps else x_0)
            if callback:
                callback(done, pictures)
        return pictures


def to_unit(pictures: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], clipped."""
    return ((pictures + 1) / 2).clamp(0, 1)
