"""CLIP guidance: sampling follows the gradient of CLIP's similarity between the predicted image and prompts.

The losses are those of CLIP-guided diffusion (Crowson 2021): the spherical distance to the prompts of random cutouts of
the prediction, blended with the noisy image late in the run, and a total-variation and a range loss.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.clip.base import CLIPModel, feature_distance
from dalle_pytorch.errors import UsageError
from diffusion.denoiser import Denoiser, Prediction
from diffusion.samplers import Guide, generator
from diffusion.schedule import at

LARGEST_WEIGHT = 1e12  # of a prompt, as of the options of a command line
PURE_NOISE = 1e-5  # alpha-bar below this; a linear schedule starts at 4e-5 and is guided from its first step


def parse_prompts(text: str, default_weight: float = 1.0) -> list[tuple[str, float]]:
    """`a seven:2|brick` → [("a seven", 2.0), ("brick", 1.0)]; a colon without a number belongs to the prompt."""
    prompts = []
    for part in filter(None, (part.strip() for part in text.split("|"))):
        prompt, colon, weight = part.rpartition(":")
        try:
            prompts.append((prompt.strip(), float(weight)) if colon and prompt.strip() else (part, default_weight))
        except ValueError:
            prompts.append((part, default_weight))
    return prompts


def make_cutouts(image: Tensor, size: int, count: int, power: float, random: torch.Generator,
                 sides: tuple[int, int] | None = None) -> Tensor:  # fmt: skip
    """`count` random squares of one (3, h, w) image, averaged down to `size` pixels a side: (count, 3, size, size).

    A cutout's side lies a fraction u^power of the way from the first to the second of `sides`, by default `size` and
    the image's side, for a uniform u: a small power favours large cutouts, and 0 always takes the largest.
    """
    height, width = image.shape[-2:]
    smallest, largest = (min(height, width, side) for side in sides or (size, max(height, width)))
    cutouts = []
    for u, v, w in torch.rand(count, 3, generator=random).tolist():
        side = int(smallest + u**power * (largest - smallest))
        top, left = int(v * (height - side + 1)), int(w * (width - side + 1))
        cutouts.append(F.adaptive_avg_pool2d(image[:, top : top + side, left : left + side], size))
    return torch.stack(cutouts)


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared angle between vectors along the last dimension; the other dimensions broadcast."""
    return (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).norm(dim=-1).div(2).arcsin().square().mul(2)


def tv_loss(x: Tensor) -> Tensor:
    """Total variation, (b,): mean squared difference between neighbouring pixels of (b, 3, h, w) images."""
    x = F.pad(x, (0, 1, 0, 1), "replicate")
    across, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (across.square() + down.square()).mean((1, 2, 3))


def range_loss(x: Tensor) -> Tensor:
    """Mean squared excess over [-1, 1], (b,)."""
    return (x - x.clamp(-1, 1)).square().mean((1, 2, 3))


def init_loss(init_image: Tensor, clip: CLIPModel) -> Callable[[Tensor], Tensor]:
    """The distance (b,) of images (b, 3, h, w) in [-1, 1] to `init_image`, in [0, 1].

    It is LPIPS (Zhang et al. 2018, arXiv:1801.03924) where its package is installed, which has torchvision with it;
    else the distance of CLIP's features of the patches, in all layers.
    """
    if lpips := _lpips():
        lpips, start = lpips.to(init_image.device), init_image * 2 - 1
        return lambda images: lpips(images, start).flatten()

    def features(images: Tensor) -> list[Tensor]:
        return clip.visual_features(F.adaptive_avg_pool2d(images, clip.image_size))

    wanted = features(init_image)
    return lambda images: feature_distance(features((images + 1) / 2), wanted)


@lru_cache(maxsize=1)
def _lpips() -> nn.Module | None:
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)


def encode_prompts(
    clip: CLIPModel, prompts: Sequence[tuple[str, float]], image_prompts: Sequence[tuple[Tensor, float]] = (),
    cutn: int = 16, cut_pow: float = 1.0,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """CLIP's features (n, dim) of weighted prompts, and the n weights. An image prompt, (3, h, w) in [0, 1], has
    `cutn` of them, of its cutouts.

    Raises `UsageError` without a prompt, and for a weight that is not finite or too large.
    """
    if not prompts and not image_prompts:
        raise UsageError("CLIP guidance needs a prompt: a text or an image")
    if wrong := [weight for _, weight in (*prompts, *image_prompts) if not abs(weight) <= LARGEST_WEIGHT]:
        raise UsageError(f"expected weights of prompts of at most {LARGEST_WEIGHT:g}, got {wrong[0]:g}")
    targets, weights, device = [], [], clip.device
    with torch.no_grad():
        for prompt, weight in prompts:
            targets.append(clip.encode_text(clip.tokenize([prompt]).to(device)))
            weights += [weight]
        for i, (image, weight) in enumerate(image_prompts):
            cutouts = make_cutouts(image.to(device), clip.image_size, cutn, cut_pow, generator("image prompt", i))
            targets.append(clip.encode_image(cutouts))
            weights += [weight / cutn] * cutn
    return torch.cat([target.float() for target in targets]), weights


class ClipGuidance:
    """Guides a batch of images towards prompts.

    Steps of pure noise are not guided, where x does not show the image yet: a gradient moves x_0 by
    (1 - alpha-bar) / sqrt(alpha-bar) of it, a factor of 20,000 at the start of a cosine schedule.

    Args:
        clip: the model whose similarity is followed.
        prompts: (text, weight). Weights are divided by the sum of all; images are led away from a negative one.
        image_prompts: (image (3, h, w) in [0, 1], weight).
        clip_guidance_scale, tv_scale, range_scale: weights of the three losses.
        cutn: cutouts per image.
        cut_pow: see `make_cutouts`.
        guidance_every: the gradient is taken at every so many steps; those between move x_0 as the last one did.
        guidance_min_sigma: no guidance where the noise, sqrt(1 / alpha-bar - 1) in units of the image, is below this.
        guidance_through_unet: whether the gradient goes back through the network, at twice its cost; else the network
            is replaced by a linear estimate (`Denoiser.x_0_slope`), as in ΠGDM (Song et al. 2023).

    Raises `UsageError` without a prompt, for a weight that is not finite or too large, and when the weights cancel out.
    """

    def __init__(self, clip: CLIPModel, prompts: Sequence[tuple[str, float]] = (),
                 image_prompts: Sequence[tuple[Tensor, float]] = (), clip_guidance_scale: float = 1000.0,
                 tv_scale: float = 0.0, range_scale: float = 0.0, cutn: int = 16, cut_pow: float = 1.0,
                 guidance_every: int = 1, guidance_min_sigma: float = 0.0,
                 guidance_through_unet: bool = True):  # fmt: skip
        self.clip = clip
        self.clip_guidance_scale, self.tv_scale, self.range_scale = clip_guidance_scale, tv_scale, range_scale
        self.cutn, self.cut_pow = cutn, cut_pow
        self.guidance_every, self.guidance_min_sigma = guidance_every, guidance_min_sigma
        self.guidance_through_unet = guidance_through_unet
        self.targets, weights = encode_prompts(clip, prompts, image_prompts, cutn, cut_pow)
        total = sum(weights)
        if abs(total) < 1e-3:
            raise UsageError(f"the weights of the prompts cancel out: their sum is {total:g}")
        self.weights = torch.tensor(weights, device=self.targets.device) / abs(total)

    def guide(self, identities: Sequence[tuple], init_image: Tensor | None = None, init_scale: float = 0.0) -> Guide:
        """The `guide` of a sampler, for one run over a batch of images with these identities, such as (seed, input,
        image).

        `init_scale` is the weight of their distance to `init_image` (b, 3, h, w) in [0, 1], see `init_loss`.
        """
        to_init = init_loss(init_image, self.clip) if init_image is not None and init_scale else None
        last: tuple[int, Tensor] | None = None  # the step of the last gradient, and how far it moved x_0

        def loss(denoiser: Denoiser, x: Tensor, step: int, x_0: Tensor) -> Tensor:
            share = at((1 - denoiser.schedule.alphas_cumprod).sqrt(), step, x)
            blended = x_0 * share + x * (1 - share)
            randoms = [generator(*identity, "cutouts", step) for identity in identities]
            total = (
                self.clip_guidance_scale * self.clip_loss(blended, randoms)
                + self.tv_scale * tv_loss(blended)
                + self.range_scale * range_loss(x_0)
            )
            return total if to_init is None else total + init_scale * to_init(blended)

        def guide(denoiser: Denoiser, x: Tensor, step: int) -> tuple[Prediction, Tensor | None]:
            nonlocal last
            alpha_bar = denoiser.schedule.alphas_cumprod[step].item()
            if alpha_bar < PURE_NOISE or math.sqrt(1 / alpha_bar - 1) < self.guidance_min_sigma:
                return denoiser(x, step), None
            shift = (1 - alpha_bar) / math.sqrt(alpha_bar)  # of x_0 by a gradient
            if last is not None and 0 < last[0] - step < self.guidance_every:
                return denoiser(x, step), last[1] / shift
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                with torch.set_grad_enabled(self.guidance_through_unet):
                    prediction = denoiser(x, step, clip=False)
                x_0 = prediction.x_0
                if not self.guidance_through_unet:
                    x_0 = x_0 + denoiser.x_0_slope(x, step) * (x - x.detach())
                # Each image's loss depends on its own pixels alone, so the sum's gradient is each image's own.
                gradient = -torch.autograd.grad(loss(denoiser, x, step, x_0).sum(), x)[0]
            last = step, gradient * shift
            prediction = Prediction(*(value.detach() for value in prediction))
            return denoiser.clip(x.detach(), step, prediction), gradient

        return guide

    def clip_loss(self, images: Tensor, randoms: Sequence[torch.Generator]) -> Tensor:
        """Weighted distance of (b, 3, h, w) images in [-1, 1] to the prompts, averaged over cutouts: (b,)."""
        cutouts = [
            make_cutouts(image, self.clip.image_size, self.cutn, self.cut_pow, random)
            for image, random in zip(images, randoms, strict=True)
        ]
        features = self.clip.encode_image((torch.cat(cutouts) + 1) / 2).float()
        distances = spherical_distance(features[:, None], self.targets)
        return (distances @ self.weights).view(len(images), self.cutn).mean(1)
