"""Super-resolution: a second diffusion, told a small picture, draws the large one (Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.samplers import SAMPLERS, Noise, generator
from diffusion.unet import NUM_CLASSES


class SuperResolution(nn.Module):
    """Enlarges pictures with a `Denoiser` whose U-Net is conditioned on a smaller picture and on nothing else.

    guided-diffusion's published ones are also conditioned on a class of ImageNet, 0 to 999: `class_label`.
    Raises `ValueError` if the U-Net is no such one, or if a class is given and not wanted, or wanted and not given.
    """

    def __init__(self, denoiser: Denoiser, class_label: int | None = None):
        super().__init__()
        self.unet = denoiser.network
        self.denoiser = denoiser
        self.class_label = class_label
        config = self.unet.config
        if not config["low_res_condition"] or config["emb_condition"]:
            raise ValueError("this U-Net is not one for super-resolution: it does not draw from a smaller picture")
        if config["class_cond"] and class_label is None:
            raise ValueError("this U-Net wants to be told a class of ImageNet, a number from 0 to 999")
        if class_label is not None and not (config["class_cond"] and 0 <= class_label < NUM_CLASSES):
            wanted = "numbers from 0 to 999" if config["class_cond"] else "no class"
            raise ValueError(f"the class {class_label} is given, and this U-Net takes {wanted}")

    @torch.no_grad()
    def enlarge(
        self,
        pictures: Tensor,
        size: int,
        identities: Sequence[object],
        steps: str | int = "quad25",
        sampler: str = "ddim",
        callback: Callable[[], object] | None = None,
    ) -> Tensor:
        """Square pictures (b, 3, h, h) in [0, 1] → (b, 3, s, s) in [0, 1], where s is `size` or, where the U-Net's
        levels do not divide that, the next side that they do.

        A picture's noise is fixed by its entry in `identities`, such as (seed, input, image). `steps` and `sampler` are
        those of `DiffusionDecoder.decode`; `callback` is called after every step.
        """
        size = -(-size // self.unet.downscale) * self.unet.downscale
        conditioning = {"low_res": pictures * 2 - 1}
        if self.class_label is not None:
            conditioning["y"] = torch.full((len(pictures),), self.class_label, device=pictures.device)
        denoiser = self.denoiser.respaced(steps).conditioned(**conditioning)
        generators = [generator("super-resolution", identity) for identity in identities]
        noise = Noise(generators, (3, size, size), pictures.device)
        for _, x, _ in SAMPLERS[sampler](denoiser, noise(), noise, None):  # noqa: B007  the last one is wanted
            if callback is not None:
                callback()
        return ((x + 1) / 2).clamp(0, 1)
