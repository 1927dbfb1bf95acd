"""Stage 2: tokens or pictures are drawn anew, larger and finer, by the diffusion decoder.

python upscale.py --input outputs/a_red_seven_on_brick --clip_guidance
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_pytorch.cli import ArgumentParser, number, run, setting
from dalle_pytorch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.decoder import DiffusionDecoder
    from diffusion.guidance import ClipGuidance
    from diffusion.super_resolution import SuperResolution

DEFAULT_MODEL = Path(__file__).resolve().parent / "models/default"
SAMPLERS = ("ddim", "ddpm", "dpm++", "unipc")
LARGEST_SHEET = 16  # inputs shown in before_after.png


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True,
                        help="a .npy of tokens, a folder of them (0.npy, the best, first), or a picture")  # fmt: skip
    parser.add_argument("--keep", type=number(int, 1), metavar="K", help="of a folder, only the first K")

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_batches", type=number(int, 1), default=1, help="batches drawn from an input (default 1)")
    group.add_argument("--batch_size", type=number(int, 1), default=1, help="pictures drawn at once (default 1)")
    group.add_argument("--steps", default="quad25",
                       help="diffusion steps: 25 evenly spaced, quad25 mostly late ones, ddim25 as guided-diffusion's, "
                            "10,10,5 of three equal parts (default quad25)")  # fmt: skip
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default ddim)")
    group.add_argument("--seed", type=int, default=0, help="a picture is the same under a seed, whatever else is drawn")
    group.add_argument("--stop_at", type=number(int, 1), metavar="N",
                       help="end after N steps: early pictures are smooth")  # fmt: skip
    group.add_argument("--output_size", type=number(int, 16, 8192),
                       help="final side in pixels (default: the model's, and four times that with "
                            "--super_res_path)")  # fmt: skip

    group = parser.add_argument_group("guidance by CLIP")
    group.add_argument("--clip_guidance", action="store_true", help="lead the pictures towards the prompts")
    group.add_argument("--text", help="prompts, divided by |, each with a weight if wanted, prompt:weight "
                                      "(default: the folder's caption.txt)")  # fmt: skip
    group.add_argument("--image_prompts", help="pictures as prompts, likewise")
    group.add_argument("--clip_guidance_scale", type=number(float, 0),
                       help="(default: the default model's own, or 1000 with another)")  # fmt: skip
    group.add_argument("--tv_scale", type=number(float, 0), default=0.0, help="smoothness (default 0)")
    group.add_argument("--range_scale", type=number(float, 0), default=0.0, help="holds colours in range (default 0)")
    group.add_argument("--cutn", type=number(int, 1), default=16, help="cutouts that CLIP sees a step (default 16)")

    group = parser.add_argument_group("output")
    group.add_argument("--outputs_dir", type=Path, help="where the pictures go (default: beside the input)")
    group.add_argument("--save_every", type=number(int, 1), metavar="N", help="write a preview every N steps")

    group = parser.add_argument_group("models (without these, the one in models/default)")
    group.add_argument("--model_path", help="a native folder, or a .pt of guided-diffusion's")
    group.add_argument("--model_size", type=int, choices=(64, 128, 256), help="which published settings a .pt has")
    group.add_argument("--unet_flags", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
                       help="guided-diffusion's flags for a .pt, such as num_head_channels=64")  # fmt: skip
    group.add_argument("--super_res_path", help="a super-resolution U-Net that draws the pictures at --output_size: "
                                                "a .pt of guided-diffusion's, or a native folder")  # fmt: skip
    group.add_argument("--super_res_flags", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
                       help="its flags, likewise")  # fmt: skip
    group.add_argument("--super_res_class", type=number(int, 0, 999), metavar="N",
                       help="the class of ImageNet that it is told, if it is one that wants to know")  # fmt: skip
    group.add_argument("--vae_path", help="the VAE of the tokens: a native folder, or a VQGAN's .ckpt")
    group.add_argument("--vqgan_config_path", help="its model.yaml")
    group.add_argument("--dvae_mode", action="store_true", help="--vae_path is a DiscreteVAE, a vae.pt")
    group.add_argument("--clip_path", help="the CLIP that guides: a native folder, an OpenAI file, a hub name")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    group.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    arguments = parser.parse_args(argv)
    if arguments.dvae_mode and not arguments.vae_path:
        parser.error("--dvae_mode goes with --vae_path")
    if (arguments.super_res_flags or arguments.super_res_class is not None) and not arguments.super_res_path:
        parser.error("--super_res_flags and --super_res_class go with --super_res_path")
    if (arguments.unet_flags or arguments.model_size) and not is_foreign(arguments.model_path):
        parser.error("--unet_flags and --model_size go with a .pt in --model_path")
    return arguments


def find_inputs(path: Path, keep: int | None) -> list[Path]:
    """The files to draw from; those in a folder by number, which is their rank. Raises `UsageError` without any."""
    if not path.exists():
        raise UsageError(f"there is no {path}; --input is a .npy of tokens, a folder of them, or a picture")
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.npy"), key=lambda file: (not file.stem.isdecimal(), len(file.stem), file.stem))
    if not found:
        raise UsageError(f"{path} holds no .npy of tokens; generate.py writes them with --output_npy")
    return found[:keep]


def read_prompts(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """The prompts and their weights, lower-cased; an input's caption as it stands where no prompt is given."""
    from diffusion.guidance import parse_prompts

    if arguments.text is not None:
        prompts = parse_prompts(arguments.text.lower())
        if not prompts:
            raise UsageError("the prompt is empty; say in a few words what the pictures show")
        return prompts
    folder = arguments.input if arguments.input.is_dir() else arguments.input.parent
    caption = folder / "caption.txt"
    text = caption.read_text("utf-8", errors="replace").strip().lower() if caption.is_file() else ""
    if not text and not arguments.image_prompts:
        raise UsageError(f"--clip_guidance needs --text or --image_prompts: there is no caption in {caption}")
    return [(text, 1.0)] if text else []


# --------------------------------------------------------------------------------------------------
# Models


def open_vae(arguments: argparse.Namespace) -> Any:
    """The VAE that is asked for, or None where the model brings its own."""
    from dalle_pytorch.pretrained import PretrainedModel

    path = arguments.vae_path
    if path and Path(path).is_dir():
        return PretrainedModel.from_pretrained(path)
    if arguments.dvae_mode:
        from dalle_pytorch.published.vaes import load_discrete_vae

        return load_discrete_vae(path)
    if path is None and not is_foreign(arguments.model_path):
        return None
    from dalle_pytorch.published.vaes import load_vqgan

    return load_vqgan(path, arguments.vqgan_config_path)


def is_foreign(model_path: str | None) -> bool:
    """Whether it is a file from elsewhere and not a native folder."""
    return model_path is not None and (Path(model_path).is_file() or Path(model_path).suffix in (".pt", ".pth"))


def open_decoder(arguments: argparse.Namespace) -> DiffusionDecoder:
    from diffusion.decoder import DiffusionDecoder

    vae = open_vae(arguments)
    if is_foreign(arguments.model_path):
        from diffusion.published import MODEL_SIZES, load_decoder

        flags = {**MODEL_SIZES.get(arguments.model_size, {}), **dict(arguments.unet_flags)}
        return load_decoder(arguments.model_path, vae, **flags)
    overrides = {} if vae is None else {"vae": vae}
    return DiffusionDecoder.from_pretrained(arguments.model_path or DEFAULT_MODEL / "decoder", **overrides)


def open_super_resolution(arguments: argparse.Namespace, decoder: DiffusionDecoder) -> SuperResolution | None:
    """The second stage, if one is asked for; `output_size` is then settled."""
    if arguments.super_res_path is None:
        return None
    from diffusion.published import load_super_resolution

    drawn = decoder.unet.image_size
    arguments.output_size = arguments.output_size or 4 * drawn
    if arguments.output_size <= drawn:
        raise UsageError(f"--super_res_path enlarges: --output_size is to be above the decoder's {drawn} pixels")
    flags = dict(arguments.super_res_flags)
    return load_super_resolution(arguments.super_res_path, arguments.super_res_class, **flags)


def open_guidance(arguments: argparse.Namespace, device: Any) -> ClipGuidance | None:
    if not arguments.clip_guidance:
        if arguments.text or arguments.image_prompts:
            print("warning: prompts have no effect without --clip_guidance", file=sys.stderr)
        return None
    prompts = read_prompts(arguments)
    from dalle_pytorch import load_clip
    from dalle_pytorch.files.images import image_to_tensor, read_image
    from diffusion.guidance import ClipGuidance, parse_prompts

    weighted = parse_prompts(arguments.image_prompts or "")
    pictures = [(image_to_tensor(read_image(path))[0], weight) for path, weight in weighted]
    # The default CLIP has seen nothing but the default model's world.
    clip_path = arguments.clip_path or (None if arguments.model_path else DEFAULT_MODEL / "clip")
    clip = load_clip(clip_path).to(device).requires_grad_(False)
    scales = {name: getattr(arguments, name) for name in ("tv_scale", "range_scale", "cutn")}
    if arguments.clip_guidance_scale is not None:
        scales["clip_guidance_scale"] = arguments.clip_guidance_scale
    elif not (arguments.clip_path or arguments.model_path):
        beside = DEFAULT_MODEL / "sampling.json"
        own = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
        if "clip_guidance_scale" in own:
            scales["clip_guidance_scale"] = own["clip_guidance_scale"]
    return ClipGuidance(clip, prompts, pictures, **scales)


def read_tokens(path: Path, decoder: DiffusionDecoder) -> Tensor:
    """The tokens (side²,) of a `.npy`, or those that the VAE finds in a picture."""
    from dalle_pytorch.files.images import image_to_tensor, read_image
    from dalle_pytorch.files.tokens import load_tokens

    side, vae = decoder.image_fmap_size, decoder.vae
    if path.suffix.lower() == ".npy":
        return load_tokens(path, vae.num_tokens, side**2)
    picture = image_to_tensor(read_image(path), side * 2**vae.num_layers)
    return vae.get_codebook_indices(picture.to(decoder.device))[0].cpu()


# --------------------------------------------------------------------------------------------------


def draw(
    arguments: argparse.Namespace,
    decoder: DiffusionDecoder,
    super_resolution: SuperResolution | None,
    guidance: ClipGuidance | None,
    tokens: Tensor,
    names: list[str],
    bar: Any,
) -> list[Tensor]:
    """Draws the pictures of one grid of tokens under these names and writes them, previews too. Returns them."""
    from dalle_pytorch.files.images import save_image

    def write(name: str, picture: Tensor) -> None:
        save_image(arguments.outputs_dir / f"{name}.png", picture)

    def preview(done: int, pictures: Tensor) -> None:
        bar.update(len(pictures))
        if arguments.save_every and done % arguments.save_every == 0:
            for name, picture in zip(names[len(drawn) :], final_size(arguments, decoder, pictures), strict=False):
                write(f"{name}-step{done:04}", picture)

    drawn: list[Tensor] = []
    while len(drawn) < len(names):
        images = range(len(drawn), len(drawn) + arguments.batch_size)
        pictures = decoder.decode(
            tokens.to(decoder.device).expand(len(images), -1),
            steps=arguments.steps,
            sampler=arguments.sampler,
            seed=arguments.seed,
            images=images,
            guidance=guidance,
            stop_at=arguments.stop_at,
            callback=preview,
        )
        if super_resolution is not None:
            pictures = super_resolution.enlarge(
                pictures,
                arguments.output_size,
                [(arguments.seed, tuple(tokens.tolist()), image) for image in images],
                steps=arguments.steps,
                sampler=arguments.sampler,
                callback=lambda: bar.update(arguments.batch_size),
            )
        for image, picture in zip(images, final_size(arguments, decoder, pictures), strict=True):
            write(names[image], picture)
            drawn.append(picture)
    return drawn


def final_size(arguments: argparse.Namespace, decoder: DiffusionDecoder, pictures: Tensor) -> Tensor:
    from dalle_pytorch.files.images import resize

    return resize(pictures.cpu(), arguments.output_size or decoder.unet.image_size)


def claim_folder(folder: Path) -> None:
    """Makes the folder, or fails before the first picture has cost its time."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    inputs = find_inputs(arguments.input, arguments.keep)
    if arguments.outputs_dir is None:
        arguments.outputs_dir = arguments.input if arguments.input.is_dir() else arguments.input.parent

    from tqdm import tqdm

    from dalle_pytorch.devices import pick_device
    from dalle_pytorch.files.images import contact_sheet, save_image
    from diffusion.schedule import spaced_steps

    device = pick_device("cpu" if arguments.cpu else arguments.device)
    guidance = open_guidance(arguments, device)
    decoder = open_decoder(arguments).to(device).requires_grad_(False)
    super_resolution = open_super_resolution(arguments, decoder)
    if super_resolution is not None:
        super_resolution.to(device).requires_grad_(False)
    grids = [read_tokens(path, decoder) for path in inputs]
    steps = len(spaced_steps(decoder.denoiser.num_steps, arguments.steps))
    if arguments.stop_at and arguments.stop_at > steps:
        raise UsageError(f"--stop_at {arguments.stop_at} lies beyond the last of {steps} steps")
    larger = 0
    if super_resolution is not None:
        larger = len(spaced_steps(super_resolution.denoiser.num_steps, arguments.steps))
    claim_folder(arguments.outputs_dir)

    each = arguments.num_batches * arguments.batch_size
    sheet: list[Tensor] = []
    started = time.monotonic()
    total = len(inputs) * each * ((arguments.stop_at or steps) + larger)
    with tqdm(total=total, unit="step", dynamic_ncols=True, desc="diffusing") as bar:
        for i, (path, tokens) in enumerate(zip(inputs, grids, strict=True)):
            names = [f"{path.stem}-upscaled{f'-{image}' if image else ''}" for image in range(each)]
            drawn = draw(arguments, decoder, super_resolution, guidance, tokens, names, bar)
            if i < LARGEST_SHEET:
                before = decoder.vae.decode_image(tokens[None].to(device))
                sheet += [*final_size(arguments, decoder, before), *drawn]
    save_image(arguments.outputs_dir / "before_after.png", contact_sheet(sheet, columns=1 + each))
    count, seconds = len(inputs) * each, time.monotonic() - started
    print(f"{arguments.outputs_dir}: {count} upscaled in {seconds:.1f} s; see before_after.png")


if __name__ == "__main__":
    run(main)
