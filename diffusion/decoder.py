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
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import PretrainedModel, companion_path
from dalle_pytorch.vae.base import ImageTokenizer
from diffusion.config import DiffusionConfig
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClipGuidance
from diffusion.samplers import Noise, find_sampler, generator
from diffusion.unet import UNet

SKIP_STEPS = 0.4  # of the steps, where sampling begins with an image; from a quarter to a half is usual


class DiffusionDecoder(PretrainedModel):
    """Decodes a grid of image tokens by diffusion, in place of the VAE's own decoder.

    The U-Net is conditioned on the tokens' codebook rows, on the image that the VAE decodes from them, or on both. One
    that is conditioned on neither begins with that image under noise (SDEdit, Meng et al. 2021, arXiv:2108.01073).

    `class_label` is the ImageNet class of a U-Net that is conditioned on one. The remaining arguments are the fields of
    `DiffusionConfig`. A native folder has the VAE in a folder `vae` inside or beside it. Raises `UsageError` if the
    U-Net does not fit the VAE, the class or the diffusion.
    """

    def __init__(self, unet: UNet | Mapping[str, Any], vae: ImageTokenizer, class_label: int | None = None,
                 **diffusion: Any):  # fmt: skip
        super().__init__()
        self.unet = unet if isinstance(unet, UNet) else UNet(**unet)
        self.vae = vae
        self.settings = DiffusionConfig(**diffusion)
        self.config = {"unet": self.unet.config, **asdict(self.settings)}
        self.denoiser = Denoiser.from_config(self.unet, self.settings)
        self.class_label = class_label
        if class_label is not None:
            self.unet.check_class(class_label)
            self.config["class_label"] = class_label
        network = self.unet.settings
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

    @property
    def knows_tokens(self) -> bool:
        """Whether the U-Net is conditioned on the tokens in some way."""
        return self.unet.settings.emb_condition or self.unet.settings.low_res_condition

    def conditioning(self, tokens: Tensor) -> dict[str, Tensor]:
        """The U-Net's conditions for (b, side²) tokens: `image_embeds`, `low_res`, and the class `y`. Those of equal
        tokens are computed once."""
        self.unet.check_class(self.class_label)
        tokens, rows = tokens.unique(dim=0, return_inverse=True)
        conditioning = {}
        if self.class_label is not None:
            conditioning["y"] = torch.full((len(tokens),), self.class_label, device=tokens.device)
        if self.unet.settings.emb_condition:
            conditioning["image_embeds"] = self.vae.embed(tokens)
        if self.unet.settings.low_res_condition:
            conditioning["low_res"] = self.vae.decode_image(tokens) * 2 - 1
        return {name: value[rows] for name, value in conditioning.items()}

    @property
    def image_fmap_size(self) -> int:
        """Side of the token grid of an image of `unet.image_size` pixels."""
        if self.unet.settings.emb_condition:
            return self.unet.image_size // self.unet.downscale * self.unet.settings.emb_stride
        return self.vae.image_fmap_size

    @staticmethod
    def skip_steps(given: str | float | None, has_start: bool) -> str | float:
        """`skip_steps` of `decode` unless given. Raises `UsageError` where there is no image to begin with instead."""
        if not has_start and given not in (None, 0, "0"):
            raise UsageError("skip_steps needs an image to begin with, init_from")
        return (SKIP_STEPS if has_start else 0) if given is None else given

    @torch.no_grad()
    def decode(self, tokens: Tensor, num_inference_steps: str | int | Iterable[int] = "quad25", sampler: str = "ddim",
               seed: int | Sequence[int] = 0, image_indices: Sequence[int] | None = None,
               guidance: ClipGuidance | None = None, stop_at: int | None = None, init_image: Tensor | None = None,
               skip_steps: str | float | None = None, init_scale: float = 0.0,
               callback: Callable[[int, Tensor], None] | None = None) -> Tensor:  # fmt: skip
        """(b, side²) int64 tokens → images (b, 3, h, w) in [0, 1]; their size is proportional to `side`.

        Args:
            num_inference_steps: the diffusion steps to visit, as for `spaced_steps`.
            sampler: a name in `SAMPLERS`.
            seed, image_indices: with the tokens they determine an image's noise, and its cutouts under `guidance`,
                whatever else is in the batch. The indices (0 by default) tell apart images of the same tokens. One
                seed for all, or one each.
            stop_at: end after this many steps and return the x_0 predicted there.
            init_image: images (b, 3, h, w) in [0, 1] to begin with, scaled to the U-Net's size and under the noise of
                the first step that is not skipped. For a U-Net that does not know the tokens it is the image that the
                VAE decodes, unless given.
            skip_steps: how many of the steps, the noisiest, are skipped, or which fraction of them, see
                `skipped_steps`: the more, the nearer to `init_image`. `SKIP_STEPS` unless given; 0 without an image.
            init_scale: with `guidance`, the weight of the distance to `init_image`.
            callback: called after every step with the number of steps done and the predicted x_0, in [0, 1].

        Raises `UsageError` for an unknown sampler, for steps that are not in the schedule, and for what needs an image
        to begin with, or guidance, where there is none.
        """
        run_sampler = find_sampler(sampler)
        if init_image is None and not self.knows_tokens:
            init_image = self.vae.decode_image(tokens)
        skip_steps = self.skip_steps(skip_steps, init_image is not None)
        denoiser = self.denoiser.respaced(num_inference_steps, skip_steps).conditioned(**self.conditioning(tokens))
        if init_scale and (init_image is None or guidance is None):
            raise UsageError("init_scale needs an image to begin with, and guidance by CLIP")
        stop_at = denoiser.num_steps if stop_at is None else stop_at
        if not 1 <= stop_at <= denoiser.num_steps:
            raise UsageError(f"cannot stop at step {stop_at} of {denoiser.num_steps}")

        indices = [0] * len(tokens) if image_indices is None else image_indices
        seeds = [seed] * len(tokens) if isinstance(seed, int) else seed
        identities = list(zip(seeds, map(tuple, tokens.tolist()), indices, strict=True))
        size = math.isqrt(tokens.shape[1]) * self.unet.image_size // self.image_fmap_size
        noise = Noise([generator(*identity) for identity in identities], (3, size, size), tokens.device)
        images = noise()
        if init_image is not None:
            init_image = resize(init_image, size)
            images = denoiser.q_sample(init_image * 2 - 1, denoiser.num_steps - 1, images)
        guide = guidance.guide(identities, init_image, init_scale) if guidance else None
        steps = islice(run_sampler(denoiser, images, noise, guide), stop_at)
        for done, (_, x, x_0) in enumerate(steps, 1):
            images = to_unit(x if done == denoiser.num_steps else x_0)
            if callback:
                callback(done, images)
        return images


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], clipped."""
    return ((images + 1) / 2).clamp(0, 1)
