"""The command `upscale`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dalle_pytorch.errors import UsageError, shorten
from dalle_pytorch.settings import Settings, name_value, option
from text_to_image.inputs import find_inputs, read_caption

if TYPE_CHECKING:
    from diffusion.guidance import ClipGuidance
    from text_to_image.pipeline import TextToImage

SAMPLERS = ("ddim", "ddpm", "dpm++", "unipc")


@dataclass
class _Input(Settings):
    title: ClassVar[str] = "what to redraw"
    input: Path = option(help="a .npy of tokens, a folder of them (0.npy, the best, first), or an image")
    keep: int | None = option(None, "of a folder, only the first K", low=1, metavar="K")


@dataclass
class _Sampling(Settings):
    title: ClassVar[str] = "sampling"
    num_batches: int = option(1, "batches per input", low=1)
    batch_size: int = option(1, "images per batch: each input is redrawn num_batches × batch_size times", low=1)
    inputs_per_batch: int = option(4, "inputs diffused together, which does not change the images; less needs less "
                                     "memory", low=1)  # fmt: skip
    steps: str | None = option(None, "diffusion steps: 25 evenly spaced, quad25 mostly late ones, ddim25 as "
                                     "guided-diffusion's, 10,10,5 of three equal parts (default: the default model's "
                                     "own, or quad25 with another)")  # fmt: skip
    sampler: str | None = option(None, "one of " + ", ".join(SAMPLERS) + " (default: the default model's own, or ddim "
                                       "with another)", choices=SAMPLERS)  # fmt: skip
    seed: int = option(0, "an image is the same under a seed, whatever else is drawn", high=2**64)
    stop_at: int | None = option(None, "end after N steps: early images are smooth", low=1, metavar="N")
    output_size: int | None = option(None, "final side in pixels (default: the model's, and four times that with "
                                           "--super_res_path)", low=16, high=8192)  # fmt: skip


@dataclass
class _Start(Settings):
    title: ClassVar[str] = "an image to begin with"
    init_from: str | None = option(None, "begin with the VAE's image of the tokens, or with the input image, under "
                                         "noise (default: tokens for a U-Net that does not know them, else noise "
                                         "alone)", choices=("tokens", "image"))  # fmt: skip
    skip_steps: str | None = option(None, "skip this number of the steps, or a fraction of them: the more, the nearer "
                                          "to that image (default: 0.4)", metavar="K")  # fmt: skip
    init_scale: float = option(0.0, "with --clip_guidance, holds the images near to it (usual: 1000)", low=0)


@dataclass
class _Guidance(Settings):
    title: ClassVar[str] = "guidance by CLIP"
    clip_guidance: bool = option(False, "guide the images towards the prompts")
    text: str | None = option(None, "prompts, separated by |, each with a weight if wanted, prompt:weight "
                                    "(default: the folder's caption.txt)")  # fmt: skip
    image_prompts: str | None = option(None, "images as prompts, likewise")
    clip_guidance_scale: float | None = option(None, "strength (default: 1000, or as for the following, with the "
                                                     "default model its own)", low=0)  # fmt: skip
    tv_scale: float = option(0.0, "smoothness", low=0)
    range_scale: float = option(0.0, "holds colours in range", low=0)
    cutn: int | None = option(None, "cutouts that CLIP sees a step (default: 16)", low=1)
    guidance_every: int | None = option(None, "take CLIP's gradient at every N-th step, and use it again between "
                                              "(default: 1)", low=1, metavar="N")  # fmt: skip
    guidance_min_sigma: float | None = option(None, "no guidance where the noise, in units of the image, is below this "
                                                    "(default: 0)", low=0)  # fmt: skip
    guidance_through_unet: bool | None = option(None, "take the gradient through the U-Net, which costs a pass back "
                                                      "(default: True)")  # fmt: skip


@dataclass
class _Output(Settings):
    title: ClassVar[str] = "output"
    outputs_dir: Path | None = option(None, "where the images go (default: beside the input)")
    save_every: int | None = option(None, "write a preview every N steps", low=1, metavar="N")


@dataclass
class _Models(Settings):
    title: ClassVar[str] = "models (without these, the default model)"
    model_path: str | None = option(None, "a native folder, or a .pt of guided-diffusion's")
    model_size: int | None = option(None, "which published settings a .pt has", choices=(64, 128, 256, 512))
    unet_flags: list = option([], "guided-diffusion's flags for a .pt, such as num_head_channels=64", kind=name_value,
                              nargs="+", metavar="NAME=VALUE")  # fmt: skip
    class_label: int | None = option(None, "the ImageNet class that it is conditioned on, if it is one of those",
                                     low=0, high=999, metavar="N")  # fmt: skip
    super_res_path: str | None = option(None, "a super-resolution U-Net that draws the images at --output_size: a .pt "
                                              "of guided-diffusion's, or a native folder")  # fmt: skip
    super_res_flags: list = option([], "its flags, likewise", kind=name_value, nargs="+", metavar="NAME=VALUE")
    super_res_class: int | None = option(None, "its ImageNet class, likewise", low=0, high=999, metavar="N")
    vae_path: str | None = option(None, "the VAE of the tokens: a native folder, or a VQGAN's .ckpt")
    vqgan_config_path: str | None = option(None, "its model.yaml")
    dvae_mode: bool = option(False, "--vae_path is a DiscreteVAE, a vae.pt (which is found out without this too)")
    clip_path: str | None = option(None, "the CLIP that guides: a native folder, OpenAI's or open_clip's file, a hub "
                                         "name")  # fmt: skip
    clip_config: str | None = option(None, "open_clip's architecture of --clip_path where its files do not tell it, "
                                           "such as ViT-H-14, or its JSON file", metavar="NAME|FILE")  # fmt: skip
    device: str | None = option(None, "cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    cpu: bool = option(False, "the same as --device cpu")


@dataclass
class UpscaleSettings(_Models, _Output, _Guidance, _Start, _Sampling, _Input):
    """Stage 2: the diffusion decoder redraws tokens or images, larger and finer.

    python upscale.py --input outputs/a_red_seven_on_brick --clip_guidance
    """

    def __post_init__(self) -> None:
        if (self.dvae_mode or self.vqgan_config_path) and not self.vae_path:
            raise UsageError("--dvae_mode and --vqgan_config_path go with --vae_path")
        if (self.super_res_flags or self.super_res_class is not None) and not self.super_res_path:
            raise UsageError("--super_res_flags and --super_res_class go with --super_res_path")
        if self.clip_config and not self.clip_path:
            raise UsageError("--clip_config goes with --clip_path")


def guidance(settings: UpscaleSettings, pipe: TextToImage) -> ClipGuidance | None:
    """Guidance by the prompts, or by an input's caption as it stands where no prompt is given."""
    from diffusion.guidance import parse_prompts

    if not settings.clip_guidance:
        if settings.text or settings.image_prompts:
            print("warning: prompts have no effect without --clip_guidance", file=sys.stderr)
        return None
    caption = read_caption(settings.input) if settings.text is None else None
    if settings.text is None and caption is None and not settings.image_prompts:
        raise UsageError(f"--clip_guidance needs --text or --image_prompts: {settings.input} has no caption.txt")
    prompts = parse_prompts((settings.text or "").lower()) if caption is None else caption
    for prompt in [caption] if caption else [text for text, _ in prompts]:
        if lost := pipe.model.scorer.lost_text(prompt):
            print(
                f"warning: this CLIP does not read all of the prompt; left out: {shorten(lost, 200)}", file=sys.stderr
            )
    options = settings.values(_Guidance)
    for name in ("clip_guidance", "text", "image_prompts"):
        del options[name]
    return pipe.guidance(prompts, parse_prompts(settings.image_prompts or ""), **options)


def main(argv: Sequence[str] | None = None) -> None:
    settings = UpscaleSettings.parse(argv)
    paths = find_inputs(settings.input, settings.keep)
    folder = settings.outputs_dir or (settings.input if settings.input.is_dir() else settings.input.parent)

    from dalle_pytorch.files.images import save_image
    from text_to_image.pipeline import TextToImage
    from text_to_image.progress import ProgressBar
    from text_to_image.results import LARGEST_COMPARISON, make_writable, upscaled_name

    pipe = TextToImage.from_pretrained(
        device="cpu" if settings.cpu else settings.device, decoder=settings.model_path, model_size=settings.model_size,
        unet_flags=dict(settings.unet_flags), class_label=settings.class_label,
        super_resolution=settings.super_res_path, super_res_flags=dict(settings.super_res_flags),
        super_res_class=settings.super_res_class,
        vae=settings.vae_path, vqgan_config_path=settings.vqgan_config_path, scorer=settings.clip_path,
        clip_config=settings.clip_config,
    )  # fmt: skip
    per_input = settings.num_batches * settings.batch_size

    def preview(step, images, items) -> None:
        if step % settings.save_every == 0:
            for image, (i, number) in zip(images, items, strict=True):
                save_image(folder / f"{upscaled_name(paths[i].stem, number)}-step{step:04}.png", image)

    inputs = pipe.read(paths)
    with ProgressBar("diffusing", "step") as bar:
        upscaled = pipe.upscale_each(
            inputs, per_input, batch_size=settings.batch_size * settings.inputs_per_batch, seed=settings.seed,
            num_inference_steps=settings.steps, sampler=settings.sampler, stop_at=settings.stop_at,
            output_size=settings.output_size, clip_guidance=guidance(settings, pipe) or False,
            init_from=settings.init_from, skip_steps=settings.skip_steps, init_scale=settings.init_scale,
            callback=preview if settings.save_every else None, progress=bar,
        )  # fmt: skip
        make_writable(folder)
        started = time.monotonic()
        shown = [[] for _ in paths[:LARGEST_COMPARISON]]
        for image in upscaled:
            save_image(folder / f"{upscaled_name(paths[image.input].stem, image.number)}.png", image.pixels)
            if image.input < len(shown):
                shown[image.input].append(image.pixels)
    save_image(folder / "before_after.png", inputs[: len(shown)].with_upscaled(shown).grid())
    seconds = time.monotonic() - started
    print(f"{folder}: {len(paths) * per_input} upscaled in {seconds:.1f} s; see before_after.png")
