"""The diffusion decoder: image tokens to images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.pretrained import PretrainedModel, companion_path
from dalle_pytorch.vae.base import ImageTokenizer
from diffusion.config import DiffusionConfig
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClipGuidance
from diffusion.samplers import Noise, find_sampler, generator
from diffusion.unet import UNet


class DiffusionDecoder(PretrainedModel):
    """Decodes a grid of image tokens by diffusion, in place of the VAE's own decoder.

    The U-Net is conditioned on the tokens' codebook rows, on the image that the VAE decodes from them, or on both. The
    remaining arguments are the fields of `DiffusionConfig`. A native folder has the VAE in a folder `vae` inside or
    beside it. Raises `UsageError` if the U-Net does not fit the VAE or the diffusion.
    """

    def __init__(self, unet: UNet | Mapping[str, Any], vae: ImageTokenizer, **diffusion: Any):
        super().__init__()
        self.unet = unet if isinstance(unet, UNet) else UNet(**unet)
        self.vae = vae
        self.settings = DiffusionConfig(**diffusion)
        self.config = {"unet": self.unet.config, **asdict(self.settings)}
        self.denoiser = Denoiser.from_config(self.unet, self.settings)
        network = self.unet.settings
        if not (network.emb_condition or network.low_res_condition):
            raise UsageError("this U-Net is not conditioned on tokens: expected emb_condition or low_res_condition")
        if network.emb_condition and network.emb_input_dims != vae.codebook_dim:
            raise UsageError(
                f"this U-Net expects codebook rows of {network.emb_input_dims} channels, got a VAE with "
                f"{vae.codebook_dim}"
            )

    def own_state_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("vae.")}

    @classmethod
    def companions(cls, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        if "vae" in overrides:
            return {}
        if (path := companion_path(folder, "vae")) is None:
            raise CheckpointError(f"{folder} has no VAE: there is no folder vae in it or beside it")
        return {"vae": ImageTokenizer.from_pretrained(path)}

    def conditioning(self, tokens: Tensor) -> dict[str, Tensor]:
        """The U-Net's conditions for (b, side²) tokens: `image_embeds`, `low_res` or both."""
        conditioning = {}
        if self.unet.settings.emb_condition:
            conditioning["image_embeds"] = self.vae.embed(tokens)
        if self.unet.settings.low_res_condition:
            conditioning["low_res"] = self.vae.decode_image(tokens) * 2 - 1
        return conditioning

    @property
    def image_fmap_size(self) -> int:
        """Side of the token grid of an image of `unet.image_size` pixels."""
        if self.unet.settings.emb_condition:
            return self.unet.image_size // self.unet.downscale * self.unet.settings.emb_stride
        return self.vae.image_fmap_size

    @torch.no_grad()
    def decode(self, tokens: Tensor, num_inference_steps: str | int | Iterable[int] = "quad25", sampler: str = "ddim",
               seed: int = 0, image_indices: Sequence[int] | None = None, guidance: ClipGuidance | None = None,
               stop_at: int | None = None,
               callback: Callable[[int, Tensor], None] | None = None) -> Tensor:  # fmt: skip
        """(b, side²) int64 tokens → images (b, 3, h, w) in [0, 1]; their size is proportional to `side`.

        Args:
            num_inference_steps: the diffusion steps to visit, as for `spaced_steps`.
            sampler: a name in `SAMPLERS`.
            seed, image_indices: with the tokens they determine an image's noise, and its cutouts under `guidance`,
                whatever else is in the batch. The indices (0 by default) tell apart images of the same tokens.
            stop_at: end after this many steps and return the x_0 predicted there.
            callback: called after every step with the number of steps done and the predicted x_0, in [0, 1].

        Raises `UsageError` for an unknown sampler and for steps that are not in the schedule.
        """
        run_sampler = find_sampler(sampler)
        denoiser = self.denoiser.respaced(num_inference_steps).conditioned(**self.conditioning(tokens))
        stop_at = denoiser.num_steps if stop_at is None else stop_at
        if not 1 <= stop_at <= denoiser.num_steps:
            raise UsageError(f"cannot stop at step {stop_at} of {denoiser.num_steps}")

        indices = [0] * len(tokens) if image_indices is None else image_indices
        identities = [(seed, tuple(row), index) for row, index in zip(tokens.tolist(), indices, strict=True)]
        size = math.isqrt(tokens.shape[1]) * self.unet.image_size // self.image_fmap_size
        noise = Noise([generator(*identity) for identity in identities], (3, size, size), tokens.device)
        guide = guidance.guide(identities) if guidance else None
        images = noise()
        steps = islice(run_sampler(denoiser, images, noise, guide), stop_at)
        for done, (_, x, x_0) in enumerate(steps, 1):
            images = to_unit(x if done == denoiser.num_steps else x_0)
            if callback:
                callback(done, images)
        return images


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], clipped."""
    return ((images + 1) / 2).clamp(0, 1)
