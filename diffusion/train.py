"""Trains a diffusion decoder for a VAE's tokens and writes it as a native folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, run
from dalle_pytorch.training_cli import add_training_arguments, run_training, training_options


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_arguments(parser, steps=12_000, batch_size=16, learning_rate=1e-3)
    parser.set_defaults(ema_decay=0.999, weight_decay=0.0, num_workers=2)
    parser.add_argument("--vae_path", required=True, help="native folder of the VAE whose tokens are to be decoded")
    parser.add_argument("--crop_size", type=int, default=128, help="train mostly on crops of this many pixels")
    group = parser.add_argument_group("model")
    group.add_argument("--image_size", type=int, default=256, help="side in pixels of the pictures it draws")
    group.add_argument("--num_channels", type=int, default=64, help="channels at the finest level")
    group.add_argument("--channel_mult", type=float, nargs="+", default=[1, 1.5, 2], help="times these at each level")
    group.add_argument("--num_res_blocks", type=int, default=1, help="residual blocks a level")
    group.add_argument("--attention_resolutions", type=int, nargs="*", default=[],
                       help="sides of feature maps that attend, besides the middle's")  # fmt: skip
    group.add_argument("--num_heads", type=int, default=4, help="attention heads")
    group.add_argument("--emb_output_dims", type=int, default=64, help="channels by which the tokens join the middle")
    group.add_argument("--patch_size", type=int, default=4, help="fold so many pixels, each way, into channels")
    group.add_argument("--dropout", type=float, default=0.0)
    group = parser.add_argument_group("diffusion")
    group.add_argument("--diffusion_steps", type=int, default=1000)
    group.add_argument("--noise_schedule", choices=["linear", "cosine"], default="cosine")
    group.add_argument("--predict", choices=["x_0", "eps"], default="x_0", help="what the network predicts")
    group.add_argument("--learn_sigma", action="store_true", help="learn the variance too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.data import open_dataset
    from dalle_pytorch.vae.vqgan import VQGanVAE
    from diffusion.decoder import DiffusionDecoder
    from diffusion.training import DecoderTask
    from diffusion.unet import UNet

    torch.manual_seed(arguments.seed)
    vae = VQGanVAE.from_pretrained(arguments.vae_path)
    middle = arguments.image_size // arguments.patch_size // 2 ** (len(arguments.channel_mult) - 1)
    unet = UNet(
        image_size=arguments.image_size,
        num_channels=arguments.num_channels,
        channel_mult=arguments.channel_mult,
        num_res_blocks=arguments.num_res_blocks,
        attention_resolutions=arguments.attention_resolutions,
        num_heads=arguments.num_heads,
        dropout=arguments.dropout,
        learn_sigma=arguments.learn_sigma,
        resblock_updown=False,
        emb_condition=True,
        emb_input_dims=vae.codebook.shape[1],
        emb_output_dims=arguments.emb_output_dims,
        emb_stride=max(1, vae.image_size // 2**vae.num_layers // middle),
        low_res_condition=True,
        low_res_residual=arguments.predict == "x_0",
        patch_size=arguments.patch_size,
    ).to(memory_format=torch.channels_last)
    decoder = DiffusionDecoder(
        unet,
        vae,
        diffusion_steps=arguments.diffusion_steps,
        noise_schedule=arguments.noise_schedule,
        predict_xstart=arguments.predict == "x_0",
        rescale_timesteps=True,
    )
    task = DecoderTask(decoder, arguments.crop_size)
    dataset = open_dataset(arguments.image_text_folder, arguments.image_size)
    run_training("decoder", task, dataset, training_options(arguments))
    decoder.save_pretrained(Path(arguments.output_dir) / "decoder", dtype=torch.float16)


if __name__ == "__main__":
    run(main)
