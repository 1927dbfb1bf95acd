"""Trains a DiscreteVAE on pictures, which need no captions, and writes it as a native folder.

    python DALLE-pytorch/train_vae.py --image_folder pictures --image_size 128 --output_dir runs/vae
    python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vae/vae

Flags and defaults are DALLE-pytorch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, number, run
from dalle_pytorch.training.cli import add_training_arguments, dataset_settings, run_training, training_options


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, steps=20_000, batch_size=8, learning_rate=1e-3, output_dir="runs/vae")
    parser.set_defaults(steps=None, epochs=20, warmup_steps=0, weight_decay=0.0, lr_decay="exponential",
                        image_text_folder=None)  # fmt: skip
    parser.add_argument("--image_folder", dest="image_text_folder", default=argparse.SUPPRESS, metavar="DIR",
                        help="the same as --image_text_folder")  # fmt: skip
    parser.add_argument("--lr_decay_rate", type=number(float, 0, 1, above=True), default=0.98,
                        help="with --lr_decay exponential, the learning rate's factor every 100 steps")  # fmt: skip

    group = parser.add_argument_group("codes")
    group.add_argument("--starting_temp", type=number(float, 0, above=True), default=1.0,
                       help="temperature of the Gumbel-softmax at first")  # fmt: skip
    group.add_argument("--temp_min", type=number(float, 0, above=True), default=0.5, help="and at last")
    group.add_argument("--anneal_rate", type=number(float, 0), default=1e-6,
                       help="every 100 steps the temperature falls by the factor exp(-anneal_rate * step)")  # fmt: skip
    group.add_argument("--straight_through", action="store_true", help="one code forward, the mixture's gradient back")
    group.add_argument("--kl_loss_weight", type=number(float, 0), default=0.0,
                       help="weight of the divergence from a uniform use of the codes")  # fmt: skip
    group.add_argument("--smooth_l1_loss", action="store_true", help="instead of the mean square")
    group.add_argument("--num_images_save", type=number(int, 1), default=4, help="pictures in a grid of --sample_every")

    group = parser.add_argument_group("model")
    group.add_argument("--image_size", type=number(int, 1), default=128, help="side of a picture in pixels")
    group.add_argument("--num_tokens", type=number(int, 2), default=8192, help="size of the codebook")
    group.add_argument("--num_layers", type=number(int, 1), default=3, help="halvings: a token is 2^num_layers pixels")
    group.add_argument("--num_resnet_blocks", type=number(int, 0), default=2, help="residual blocks each way")
    group.add_argument("--emb_dim", type=number(int, 1), default=512, help="width of a code")
    group.add_argument("--hidden_dim", type=number(int, 1), default=256, help="width of the convolutions")
    group.add_argument("--transparent", action="store_true", help="pictures with an alpha channel, kept as a fourth")
    arguments = parser.parse_args(argv)
    if arguments.image_text_folder is None:
        parser.error("--image_folder is wanted: a folder of pictures, or glyphs")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.training.tasks.discrete import DiscreteVAETask
    from dalle_pytorch.vae.discrete import DiscreteVAE

    torch.manual_seed(arguments.seed)
    alpha = (0.0,) if arguments.transparent else ()  # opacity is left as it is, between 0 and 1
    vae = DiscreteVAE(
        image_size=arguments.image_size,
        num_tokens=arguments.num_tokens,
        codebook_dim=arguments.emb_dim,
        num_layers=arguments.num_layers,
        num_resnet_blocks=arguments.num_resnet_blocks,
        hidden_dim=arguments.hidden_dim,
        channels=3 + len(alpha),
        smooth_l1_loss=arguments.smooth_l1_loss,
        straight_through=arguments.straight_through,
        kl_div_loss_weight=arguments.kl_loss_weight,
        normalization=((0.5, 0.5, 0.5, *alpha), (0.5, 0.5, 0.5, *(1.0 for _ in alpha))),
    )
    task = DiscreteVAETask(
        vae,
        starting_temp=arguments.starting_temp,
        temp_min=arguments.temp_min,
        anneal_rate=arguments.anneal_rate,
        num_images_save=arguments.num_images_save,
    )
    dataset = open_dataset(
        arguments.image_text_folder,
        arguments.image_size,
        **dataset_settings(arguments),
        captions=False,
        transparent=arguments.transparent,
    )
    run_training("VAE", task, dataset, training_options(arguments))


if __name__ == "__main__":
    run(main)
