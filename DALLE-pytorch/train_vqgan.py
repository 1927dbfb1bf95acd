"""Trains a Gumbel-VQGAN on pictures, which need no captions, and writes it as a native folder.

    python DALLE-pytorch/train_vqgan.py --image_folder pictures --image_size 128 --output_dir runs/vqgan
    python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vqgan/vae

The sizes are those of a network some ten times cheaper than the published one, which has

    --image_size 256 --num_tokens 8192 --embed_dim 256 --ch 128 --ch_mult 1 1 2 4 --num_res_blocks 2
    --attn_resolutions 32 --mid_attention --patch_size 1 --crop_size 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, number, run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.training.cli import (
    add_training_arguments,
    dataset_settings,
    is_main_process,
    run_training,
    training_options,
)

GLYPHS_CLIP = Path(__file__).resolve().parents[1] / "models/default/clip"
SIZES = ("image_size", "num_tokens", "embed_dim", "ch", "ch_mult", "num_res_blocks", "attn_resolutions",
         "mid_attention", "dropout", "patch_size", "local_encoder")  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, steps=6000, batch_size=64, learning_rate=1e-3, output_dir="runs/vqgan")
    parser.add_argument("--image_folder", dest="image_text_folder", default=argparse.SUPPRESS, metavar="DIR",
                        help="the same as --image_text_folder")  # fmt: skip
    parser.add_argument("--crop_size", type=number(int, 1), default=64, help="train mostly on crops of so many pixels")
    parser.add_argument("--starting_temp", type=number(float, 0), default=0.5,
                        help="how freely codes are drawn at first; nearest ones alone for the last third")  # fmt: skip

    group = parser.add_argument_group("losses besides that of pixels")
    group.add_argument("--disc_weight", type=number(float, 0), default=0.2,
                       help="how long the adversarial loss's gradient is beside the others'; 0: none")  # fmt: skip
    group.add_argument("--disc_start", type=number(int, 0), help="the step that it joins at (default: half way)")
    group.add_argument("--disc_num_layers", type=number(int, 1), default=3,
                       help="2, 3, 4 layers judge patches of 34, 70, 142 pixels a side")  # fmt: skip
    group.add_argument("--disc_ch", type=number(int, 1), default=64, help="width of the discriminator's first layer")
    group.add_argument("--perceptual_weight", type=number(float, 0), default=1.0, help="0: no perceptual loss")
    group.add_argument("--perceptual_clip", metavar="PATH",
                       help="the CLIP whose features it compares, any that generate.py takes (default: for glyphs the "
                            "one of models/default, else none)")  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--image_size", type=number(int, 1), default=128, help="side of a picture in pixels")
    group.add_argument("--num_tokens", type=number(int, 2), default=512, help="size of the codebook")
    group.add_argument("--embed_dim", type=number(int, 1), default=16, help="width of a code")
    group.add_argument("--ch", type=number(int, 1), default=64, help="width of the convolutions at the finest level")
    group.add_argument("--ch_mult", type=number(int, 1), nargs="+", default=[1, 2],
                       help="widths of the levels, in units of --ch; each but the first halves the side")  # fmt: skip
    group.add_argument("--num_res_blocks", type=number(int, 1), default=1, help="residual blocks a level")
    group.add_argument("--attn_resolutions", type=number(int, 1), nargs="*", default=[],
                       help="sides of feature maps that attend")  # fmt: skip
    group.add_argument("--mid_attention", action="store_true", help="attention in the middle")
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.0)
    group.add_argument("--patch_size", type=number(int, 1), default=4,
                       help="pixels, each way, folded into channels before the first convolution")  # fmt: skip
    group.add_argument("--local_encoder", action="store_true",
                       help="find a token from its own square of pixels alone: easier on a prior")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.published.clip import load_clip
    from dalle_pytorch.training.losses import Adversary, PatchDiscriminator, PerceptualLoss
    from dalle_pytorch.training.options import total_steps
    from dalle_pytorch.training.tasks.vqgan import VQGanTask
    from dalle_pytorch.vae.vqgan import VQGanVAE

    torch.manual_seed(arguments.seed)
    sizes = {name: getattr(arguments, name) for name in SIZES}
    vae = VQGanVAE(z_channels=arguments.embed_dim, **sizes).to(memory_format=torch.channels_last)
    adversary = perceptual = None
    if arguments.disc_weight > 0:
        discriminator = PatchDiscriminator(ch=arguments.disc_ch, num_layers=arguments.disc_num_layers)
        adversary = Adversary(discriminator, arguments.disc_weight)
    features = arguments.perceptual_clip or (GLYPHS_CLIP if arguments.image_text_folder == "glyphs" else None)
    if features and arguments.perceptual_weight > 0:
        perceptual = PerceptualLoss(load_clip(features))
    dataset = open_dataset(
        arguments.image_text_folder,
        arguments.image_size,
        **dataset_settings(arguments),
        captions=False,
    )
    options = training_options(arguments)
    steps, start = total_steps(options, dataset), arguments.disc_start
    if steps is None:
        raise UsageError("the temperature falls over the whole run, and shards do not tell their number: give --steps")
    task = VQGanTask(
        vae,
        steps=steps * options.ga_steps,
        crop_size=arguments.crop_size,
        starting_temp=arguments.starting_temp,
        adversary=adversary,
        adversary_start=None if start is None else start * options.ga_steps,
        perceptual=perceptual,
        perceptual_weight=arguments.perceptual_weight,
    )
    if is_main_process():
        told = f"features of {features}" if perceptual else "none"
        print(f"adversarial loss: {'patches' if adversary else 'none'}; perceptual loss: {told}")
    run_training("VQGAN", task, dataset, options)


if __name__ == "__main__":
    run(main)
