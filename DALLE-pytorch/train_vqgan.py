"""Trains a Gumbel-VQGAN on pictures and writes it as a native folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, run
from dalle_pytorch.training_cli import add_training_arguments, run_training, training_options


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_arguments(parser, steps=6000, batch_size=64, learning_rate=1e-3)
    group = parser.add_argument_group("model")
    group.add_argument("--image_size", type=int, default=128, help="side of a picture in pixels")
    group.add_argument("--num_tokens", type=int, default=512, help="size of the codebook")
    group.add_argument("--embed_dim", type=int, default=16, help="width of a code")
    group.add_argument("--ch", type=int, default=64, help="width of the convolutions at the finest level")
    group.add_argument("--ch_mult", type=int, nargs="+", default=[1, 2], help="widths of the levels, in units of --ch")
    group.add_argument("--num_res_blocks", type=int, default=1)
    group.add_argument("--patch_size", type=int, default=4, help="pixels folded into one before the first convolution")
    group.add_argument("--local_encoder", action="store_true",
                       help="find every token from its own square of pixels alone: easier for a prior to learn")  # fmt: skip
    group.add_argument("--crop_size", type=int, default=64, help="train mostly on crops of this many pixels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.data import open_dataset
    from dalle_pytorch.vae.vqgan import VQGanVAE
    from dalle_pytorch.vae.vqgan_training import VQGanTask

    torch.manual_seed(arguments.seed)
    vae = VQGanVAE(
        image_size=arguments.image_size, num_tokens=arguments.num_tokens, embed_dim=arguments.embed_dim,
        z_channels=arguments.embed_dim, ch=arguments.ch, ch_mult=arguments.ch_mult,
        num_res_blocks=arguments.num_res_blocks, patch_size=arguments.patch_size, mid_attention=False,
        local_encoder=arguments.local_encoder,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    task = VQGanTask(vae, steps=arguments.steps, crop_size=arguments.crop_size)
    dataset = open_dataset(arguments.image_text_folder, arguments.image_size)
    run_training("VQGAN", task, dataset, training_options(arguments))
    vae.save_pretrained(Path(arguments.output_dir) / "vae", dtype=torch.float16)


if __name__ == "__main__":
    run(main)
