"""Trains a CLIP on pictures with captions and writes it as a native folder: what ranks and guides."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, run
from dalle_pytorch.training_cli import add_training_arguments, run_training, training_options


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_arguments(parser, steps=2000, batch_size=128, learning_rate=1e-3)
    group = parser.add_argument_group("model")
    group.add_argument("--bpe_path", required=True, help="tokenizer.json of train_tokenizer.py")
    group.add_argument("--dim_text", type=int, default=128)
    group.add_argument("--dim_image", type=int, default=192)
    group.add_argument("--dim_latent", type=int, default=128)
    group.add_argument("--text_seq_len", type=int, default=32)
    group.add_argument("--text_enc_depth", type=int, default=2)
    group.add_argument("--text_heads", type=int, default=2)
    group.add_argument("--visual_enc_depth", type=int, default=4)
    group.add_argument("--visual_heads", type=int, default=3)
    group.add_argument("--visual_image_size", type=int, default=128, help="side of a picture in pixels")
    group.add_argument("--visual_patch_size", type=int, default=16)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.clip import CLIP
    from dalle_pytorch.data import open_dataset
    from dalle_pytorch.tasks import ClipTask
    from dalle_pytorch.tokenizers import HugTokenizer

    torch.manual_seed(arguments.seed)
    tokenizer = HugTokenizer(arguments.bpe_path)
    sizes = {name: value for name, value in vars(arguments).items() if name.startswith(("dim_", "text_", "visual_"))}
    clip = CLIP(num_text_tokens=tokenizer.vocab_size, **sizes)
    clip.tokenizer = tokenizer
    clip.temperature.data.fill_(math.log(1 / 0.07))  # as in the paper, arXiv:2103.00020
    dataset = open_dataset(arguments.image_text_folder, arguments.visual_image_size)
    run_training("CLIP", ClipTask(clip), dataset, training_options(arguments))
    clip.save_pretrained(Path(arguments.output_dir) / "clip", dtype=torch.float16)


if __name__ == "__main__":
    run(main)
