"""Trains a CLIP on pictures with captions and writes it as a native folder: what ranks and guides."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, number, run
from dalle_pytorch.training.cli import (
    add_caption_arguments,
    add_training_arguments,
    dataset_settings,
    run_training,
    training_options,
)

SIZES = ("dim_text", "dim_image", "dim_latent", "text_seq_len", "text_enc_depth", "text_heads", "text_dim_head",
         "visual_enc_depth", "visual_heads", "visual_dim_head", "visual_image_size", "visual_patch_size",
         "visual_patch_dropout", "visual_conv_stem", "visual_attention_pool")  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, steps=2000, batch_size=128, learning_rate=1e-3, output_dir="runs/clip")

    group = add_caption_arguments(parser)
    group.add_argument("--text_seq_len", type=number(int, 1), default=32, help="tokens of a caption")

    group = parser.add_argument_group("model")
    group.add_argument("--dim_text", type=number(int, 1), default=128, help="width of the text's transformer")
    group.add_argument("--dim_image", type=number(int, 1), default=192, help="width of the picture's transformer")
    group.add_argument("--dim_latent", type=number(int, 1), default=128, help="width of the features")
    group.add_argument("--text_enc_depth", type=number(int, 1), default=2, help="layers")
    group.add_argument("--text_heads", type=number(int, 1), default=2, help="attention heads")
    group.add_argument("--text_dim_head", type=number(int, 1), default=64, help="width of a head")
    group.add_argument("--visual_enc_depth", type=number(int, 1), default=4, help="layers")
    group.add_argument("--visual_heads", type=number(int, 1), default=3, help="attention heads")
    group.add_argument("--visual_dim_head", type=number(int, 1), default=64, help="width of a head")
    group.add_argument("--visual_image_size", type=number(int, 1), default=128, help="side of a picture in pixels")
    group.add_argument("--visual_patch_size", type=number(int, 1), default=16, help="side of a patch in pixels")
    group.add_argument("--visual_patch_dropout", type=number(float, 0, 1), default=0.0,
                       help="share of the patches left out in training")  # fmt: skip
    group.add_argument("--layer_scale", type=number(float, 0, above=True),
                       help="the first scale of every residual branch (default: DALLE-pytorch's, 0.1 in the first 18 "
                            "layers; 1 learns faster where there are few)")  # fmt: skip
    group.add_argument("--visual_conv_stem", action="store_true",
                       help="embed patches by convolutions, which see shapes sooner than one linear map")  # fmt: skip
    group.add_argument("--visual_attention_pool", action="store_true",
                       help="pool patches by attention, which sees small things sooner than their mean")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.clip.trainable import CLIP
    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.tokenizers.load import load_tokenizer
    from dalle_pytorch.training.tasks.base import LongCaption
    from dalle_pytorch.training.tasks.clip import ClipTask

    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer(arguments.bpe_path, hug=arguments.hug, chinese=arguments.chinese)
    clip = CLIP(num_text_tokens=tokenizer.vocab_size, **{name: getattr(arguments, name) for name in SIZES})
    clip.tokenizer = tokenizer
    if arguments.layer_scale is not None:
        clip.text_transformer.set_layer_scale(arguments.layer_scale)
        clip.visual_transformer.set_layer_scale(arguments.layer_scale)
    clip.temperature.data.fill_(math.log(1 / 0.07))  # as in the paper, arXiv:2103.00020
    dataset = open_dataset(
        arguments.image_text_folder,
        arguments.visual_image_size,
        **dataset_settings(arguments),
        caption_problem=None if arguments.truncate_captions else LongCaption(tokenizer, arguments.text_seq_len),
        terse_every=2,
        wrong_captions=4,
        twins=True,
    )
    run_training("CLIP", ClipTask(clip), dataset, training_options(arguments))


if __name__ == "__main__":
    run(main)
