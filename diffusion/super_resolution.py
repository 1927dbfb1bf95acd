"""Super-resolution: a second diffusion, conditioned on a small image, draws the large one (Nichol & Dhariwal 2021)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from diffusion.decoder import to_unit
from diffusion.denoiser import Denoiser
from diffusion.samplers import Noise, find_sampler, generator


class SuperResolution(nn.Module):
    """Enlarges images with a `Denoiser` whose U-Net is conditioned on a smaller image only.

    guided-diffusion's published ones are also conditioned on an ImageNet class, `class_label` 0 to 999.
    Raises `UsageError` for another kind of U-Net, and if a class is missing or cannot be used.
    """

    def __init__(self, denoiser: Denoiser, class_label: int | None = None):
        super().__init__()
        self.unet = denoiser.network
        self.denoiser = denoiser
        self.class_label = class_label
        settings = self.unet.settings
        if not settings.low_res_condition or settings.emb_condition:
            raise UsageError("this U-Net is not for super-resolution: it is not conditioned on a smaller image alone")
        self.unet.check_class(class_label)

    @torch.no_grad()
    def enlarge(self, images: Tensor, size: int, identities: Sequence[object],
                num_inference_steps: str | int = "quad25", sampler: str = "ddim",
                callback: Callable[[], object] | None = None) -> Tensor:  # fmt: skip
        """Square images (b, 3, h, h) in [0, 1] → (b, 3, s, s) in [0, 1].

        s is `size`, rounded up to a multiple of what the U-Net's levels divide. An image's noise is determined by its
        entry in `identities`, such as (seed, input, image). `num_inference_steps` and `sampler` are those of
        `DiffusionDecoder.decode`; `callback` is called after every step.
        """
        size = -(-size // self.unet.downscale) * self.unet.downscale
        conditioning = {"low_res": images * 2 - 1}
        if self.class_label is not None:
            conditioning["y"] = torch.full((len(images),), self.class_label, device=images.device)
        denoiser = self.denoiser.respaced(num_inference_steps).conditioned(**conditioning)
        generators = [generator("super-resolution", identity) for identity in identities]
        noise = Noise(generators, (3, size, size), images.device)
        images = noise()
        for _, images, _ in find_sampler(sampler)(denoiser, images, noise):  # noqa: B007, B020
            if callback is not None:
                callback()
        return to_unit(images)
