"""The training tasks of the diffusions: images under noise, and what the network is conditioned on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.data.loading import random_crops
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import PretrainedModel, load_state
from dalle_pytorch.published.load import load_vae
from dalle_pytorch.published.unpickler import read_torch, tensor_dict
from dalle_pytorch.published.vaes import load_vqgan
from dalle_pytorch.training.tasks.base import Batch, Loss, Preview, TrainingTask
from diffusion.decoder import DiffusionDecoder, to_unit
from diffusion.denoiser import Denoiser
from diffusion.published import DIFFUSION_NAME, make_denoiser, read_diffusion
from diffusion.samplers import sample_dpm
from diffusion.schedule import spaced_steps
from diffusion.settings import DiffusionSettings, TrainDiffusionSettings, UNetArchitecture
from diffusion.super_resolution import SuperResolution
from diffusion.unet import UNet

PREVIEWS = 3  # images of a batch in a preview, and with what it shows of each a square sheet
PREVIEW_STEPS = 10


# Which steps


class UniformSteps(nn.Module):
    """Every diffusion step as often as any other."""

    def __init__(self, num_steps: int):
        super().__init__()
        self.num_steps = num_steps

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Steps (count,) int64, and the weights (count,) that make up for how often each is drawn."""
        return torch.randint(self.num_steps, (count,)), torch.ones(count, device=device)

    def learn(self, steps: Tensor, losses: Tensor) -> None:
        """Records the losses (count,) at steps (count,)."""


class LossSecondMomentSteps(UniformSteps):
    """Steps as often as their losses are large: by the root of the mean square of each one's last `history` losses
    (Improved DDPM, Nichol & Dhariwal 2021); uniform until every step has as many.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform_share: float = 0.001):
        super().__init__(num_steps)
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(num_steps, history))
        self.register_buffer("seen", torch.zeros(num_steps, dtype=torch.long))

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.seen.min() < self.losses.shape[1]:
            return super().draw(count, device)
        probabilities = self.losses.square().mean(1).sqrt()
        probabilities = probabilities / probabilities.sum() * (1 - self.uniform_share)
        probabilities = (probabilities + self.uniform_share / self.num_steps).cpu()
        steps = torch.multinomial(probabilities, count, replacement=True)
        return steps, (1 / (self.num_steps * probabilities[steps])).to(device)

    @torch.no_grad()
    def learn(self, steps: Tensor, losses: Tensor) -> None:
        for step, loss in zip(steps.tolist(), losses, strict=True):
            self.losses[step, self.seen[step] % self.losses.shape[1]] = loss
            self.seen[step] += 1


class QuadraticSteps(UniformSteps):
    """Steps as `quadN` visits them when an image is sampled: most of them at little noise, where grain is decided."""

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return (self.num_steps * torch.rand(count).square()).long(), torch.ones(count, device=device)


STEP_SAMPLERS = {"uniform": UniformSteps, "quadratic": QuadraticSteps, "loss-second-moment": LossSecondMomentSteps}


# Tasks


class DiffusionTask(TrainingTask):
    """The mean loss, over a batch `image` (b, 3, h, w) uint8, of a denoiser that is conditioned on something of them.

    `crop_size` trains on squares of that many pixels, cut along the grid of `conditioning_side` cells together with
    their part of the conditioning: a quarter of the work at half the side. The share `full_share` of the steps
    sees a part of the batch whole instead, so that the network knows an image's borders from a crop's.
    """

    def __init__(self, denoiser: Denoiser, conditioning_side: int, crop_size: int | None = None,
                 full_share: float = 0.25, step_sampler: str = "uniform", use_kl: bool = False):  # fmt: skip
        super().__init__()
        self.denoiser, self.conditioning_side = denoiser, conditioning_side
        self.crop_size, self.full_share, self.use_kl = crop_size, full_share, use_kl
        self.steps = STEP_SAMPLERS[step_sampler](denoiser.num_steps)

    def conditioning(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The conditioning of images (b, 3, h, w) in [0, 1]: maps, each a whole number of cells a side."""
        raise NotImplementedError

    def compiled_parts(self) -> list[nn.Module]:
        return [self.denoiser.network]

    def examples(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (b, 3, h, w) in [-1, 1], whole or cut, and what conditions the network on them."""
        images = batch["image"].float() / 255
        with torch.no_grad():
            conditioning = self.conditioning(images, batch)
        maps = [images * 2 - 1, *conditioning.values()]
        images, *maps = random_crops(maps, self.crop_size, self.conditioning_side, self.full_share)
        return images, dict(zip(conditioning, maps, strict=True))

    def forward(self, batch: Batch) -> Loss:
        images, conditioning = self.examples(batch)
        denoiser = self.denoiser.conditioned(**conditioning)
        step, weights = self.steps.draw(len(images), images.device)
        loss = denoiser.loss(images, step, torch.randn_like(images), use_kl=self.use_kl)
        detached = loss.detach()
        self.steps.learn(step, detached)
        late = step >= denoiser.num_steps // 2
        # The mean of none is NaN, and is not shown.
        return (loss * weights).mean(), {"loss_noisy": detached[late].mean(), "loss_clear": detached[~late].mean()}


class DecoderTask(DiffusionTask):
    """`DiffusionTask` of a decoder, conditioned on the tokens that its VAE finds, at the VAE's own size, in an image.

    The remaining arguments are those of `DiffusionTask`. Raises `UsageError` if the tokens do not fit the network.
    """

    def __init__(self, decoder: DiffusionDecoder, crop_size: int | None = None, full_share: float = 0.25, **settings):
        side = decoder.vae.image_size // 2**decoder.vae.num_layers
        if decoder.image_fmap_size != side:
            raise UsageError(
                f"this U-Net draws {decoder.unet.image_size} pixels from a grid of {decoder.image_fmap_size} × "
                f"{decoder.image_fmap_size} tokens, and the VAE makes {side} × {side}; more levels (channel_mult), or "
                "larger patches, bring the middle of the network to the grid's side"
            )
        super().__init__(decoder.denoiser, side, crop_size, full_share, **settings)
        self.decoder = decoder
        decoder.vae.requires_grad_(False)

    def frozen_parts(self) -> list[nn.Module]:
        return [self.decoder.vae]

    def tokens(self, images: Tensor, batch: Batch) -> Tensor:
        """(b, side²) int64: those of the batch, or what the VAE finds."""
        if "tokens" in batch:
            return batch["tokens"]
        return self.decoder.vae.get_codebook_indices(resize(images, self.decoder.vae.image_size))

    def conditioning(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        return self.decoder.conditioning(self.tokens(images, batch))

    def fixed_parts(self) -> dict[str, str]:
        return {"VAE": self.decoder.vae.fingerprint()}

    def preview_steps(self) -> str:
        return f"quad{min(PREVIEW_STEPS, self.denoiser.num_steps)}"

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"decoder": self.decoder}

    def write_companions(self, folder: Path) -> None:
        self.decoder.vae.save_pretrained(folder / "vae", dtype=torch.float16)

    def preview(self, batch: Batch) -> Preview:
        """Of each image three: itself, the VAE's reconstruction of it, and what the decoder draws in its place."""
        batch = {name: batch[name][:PREVIEWS] for name in ("image", "tokens") if name in batch}
        images = batch["image"].float() / 255
        tokens = self.tokens(images, batch)
        reconstructed = resize(self.decoder.vae.decode_image(tokens), images.shape[-1])
        return {"decoded": _side_by_side(images, reconstructed, self.decoder.decode(tokens, self.preview_steps()))}


class DistillationTask(DecoderTask):
    """A copy of the decoder, its student, learns to draw in `passes` DDIM steps, `quadN`, what the decoder itself draws
    in `substeps` for each of them (Salimans & Ho 2022, arXiv:2202.00512, in one stage).

    The teacher goes from an image under the noise of one of the steps to that of the next; the student is to predict
    the x_0 that leads there at once. Raises `UsageError` for a network that predicts noise: from noise alone, where the
    first step is, no x_0 follows.
    """

    def __init__(self, decoder: DiffusionDecoder, passes: int, crop_size: int | None = None, full_share: float = 0.25,
                 substeps: int = 4):  # fmt: skip
        super().__init__(decoder, crop_size, full_share)
        if not self.denoiser.predicts_x_0:
            raise UsageError("only a decoder that predicts residuals or x_0 is distilled, and this one predicts noise")
        self.teacher = deepcopy(decoder.unet).requires_grad_(False).eval()
        self.visited = spaced_steps(self.denoiser.num_steps, f"quad{passes}")
        self.substeps = substeps

    def frozen_parts(self) -> list[nn.Module]:
        return [*super().frozen_parts(), self.teacher]

    def fixed_parts(self) -> dict[str, str]:
        return {**super().fixed_parts(), "teacher": self.teacher.fingerprint()}

    def preview_steps(self) -> str:
        return f"quad{len(self.visited)}"

    def forward(self, batch: Batch) -> Loss:
        images, conditioning = self.examples(batch)
        number = int(torch.randint(len(self.visited), ()))  # one step for the batch: the loop of a sampler takes it
        denoiser = self.denoiser.conditioned(**conditioning)
        student = replace(denoiser, schedule=denoiser.schedule.visiting(self.visited))
        x = student.q_sample(images, number, torch.randn_like(images))
        with torch.no_grad():
            x_0 = self.target(replace(denoiser, network=self.teacher), x, number)
        loss = student.imitation_loss(x, number, x_0).mean()
        nan = torch.full_like(loss.detach(), torch.nan)  # which is not shown
        return loss, {f"loss_{i}": loss.detach() if i == number else nan for i in range(len(self.visited))}

    def target(self, teacher: Denoiser, x: Tensor, number: int) -> Tensor:
        """The x_0 that a DDIM step from `x`, at visited step `number`, must predict to end where the teacher does."""
        start, end = self.visited[number], self.visited[number - 1] if number else -1
        count = min(self.substeps, start - end)
        between = [end + round((start - end) * i / count) for i in range(1, count + 1)]
        path = replace(teacher, schedule=teacher.schedule.visiting([*([end] if number else []), *between]))
        *_, (_, result, _) = islice(sample_dpm(path, x, lambda: x), count)
        alpha_bar = teacher.schedule.alphas_cumprod
        before, after = alpha_bar[start].item(), alpha_bar[end].item() if number else 1.0
        ratio = math.sqrt((1 - after) / (1 - before))
        return (result - ratio * x) / (math.sqrt(after) - ratio * math.sqrt(before))


class SuperResolutionTask(DiffusionTask):
    """`DiffusionTask` of a U-Net conditioned on an image of `small_size` pixels, the mean over areas of the large one.

    `diffusion` are the arguments of `make_denoiser`. The remaining ones are those of `DiffusionTask`.
    """

    def __init__(self, unet: UNet, small_size: int, diffusion: Mapping[str, Any], crop_size: int | None = None,
                 full_share: float = 0.25, **settings):  # fmt: skip
        if unet.image_size % small_size:
            raise UsageError(f"the image size {unet.image_size} is no multiple of the small size {small_size}")
        super().__init__(make_denoiser(unet, **diffusion), small_size, crop_size, full_share, **settings)
        self.unet, self.diffusion = unet, dict(diffusion)

    def conditioning(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        small = F.interpolate(images, (self.conditioning_side, self.conditioning_side), mode="area")
        return {"low_res": small * 2 - 1}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"super_res": self.unet}

    def write_companions(self, folder: Path) -> None:
        """Writes how the network was trained, which its own configuration does not say."""
        write_text(folder / DIFFUSION_NAME, json.dumps(self.diffusion, indent=2) + "\n")

    def preview(self, batch: Batch) -> Preview:
        """Of each image three: itself, the small one enlarged by interpolation, and by the network."""
        images = batch["image"][:PREVIEWS].float() / 255
        small = to_unit(self.conditioning(images, batch)["low_res"])
        size, steps = images.shape[-1], f"quad{min(PREVIEW_STEPS, self.denoiser.num_steps)}"
        enlarged = SuperResolution(self.denoiser).enlarge(small, size, range(len(small)), steps)
        return {"enlarged": _side_by_side(images, resize(small, size), enlarged)}


def _side_by_side(*columns: Tensor) -> Tensor:
    """Several (b, 3, h, w), image by image: (b · number of them, 3, h, w)."""
    return torch.stack(columns, dim=1).flatten(0, 1)


# From settings


def make_decoder_task(settings: TrainDiffusionSettings) -> DecoderTask:
    """The task of a decoder. Raises `UsageError` for settings that do not go together."""
    vae = None
    if settings.vae_path is not None:
        config = settings.vqgan_config_path
        vae = load_vqgan(settings.vae_path, config) if config else load_vae(settings.vae_path)
    if folder := _native_folder(settings):
        overrides: dict[str, Any] = {} if vae is None else {"vae": vae}
        decoder = DiffusionDecoder.from_pretrained(folder, **overrides)
    elif settings.distill is not None:
        raise UsageError(f"--distill needs the native folder of a decoder, and {settings.resume_checkpoint} is none")
    elif vae is None:
        raise UsageError("--vae_path is missing: the VAE whose tokens are to be decoded")
    elif vae.channels != 3:
        raise UsageError(f"{settings.vae_path} is a VAE of images with opacity, and the decoder draws opaque ones")
    else:
        middle = settings.image_size // settings.patch_size // 2 ** (len(settings.channel_mult) - 1)
        unet = _make_unet(
            settings,
            emb_condition=settings.emb_condition,
            emb_input_dims=vae.embed(torch.zeros(1, 1, dtype=torch.long)).shape[1],
            emb_output_dims=settings.emb_output_dims,
            emb_stride=max(1, vae.image_size // 2**vae.num_layers // max(1, middle)),
            low_res_condition=settings.low_res_condition,
        )
        decoder = DiffusionDecoder(unet, vae, **settings.values(DiffusionSettings))
    decoder.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if settings.distill is not None:
        return DistillationTask(decoder, settings.distill, settings.crop_size)
    return DecoderTask(decoder, settings.crop_size, step_sampler=settings.schedule_sampler, use_kl=settings.use_kl)


def make_super_resolution_task(settings: TrainDiffusionSettings) -> SuperResolutionTask:
    """The task of a super-resolution network. Raises `UsageError` for settings that do not go together."""
    diffusion = settings.values(DiffusionSettings)
    if folder := _native_folder(settings):
        unet = UNet.from_pretrained(folder)
        diffusion |= read_diffusion(folder)
    else:
        unet = _make_unet(settings, low_res_condition=True)
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return SuperResolutionTask(unet, settings.small_size or unet.image_size // 4, diffusion, settings.crop_size,
                               step_sampler=settings.schedule_sampler, use_kl=settings.use_kl)  # fmt: skip


def _native_folder(settings: TrainDiffusionSettings) -> str | None:
    path = settings.resume_checkpoint
    return path if path is not None and Path(path).is_dir() else None


def _make_unet(settings: TrainDiffusionSettings, **conditioning: Any) -> UNet:
    """The network of the settings, with the weights of `--resume_checkpoint`."""
    unet = UNet(**settings.values(UNetArchitecture), gated=settings.residual_std is not None, **conditioning)
    if path := settings.resume_checkpoint:
        load_state(unet, tensor_dict(read_torch(path), path), source=path)
    return unet
