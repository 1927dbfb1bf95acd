"""Trains the prior on pictures with captions, over the tokens of a trained VAE, and writes it as a native folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, run
from dalle_pytorch.training_cli import add_training_arguments, run_training, training_options


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_arguments(parser, steps=5000, batch_size=32, learning_rate=1e-3)
    group = parser.add_argument_group("model")
    group.add_argument("--vae_path", required=True, help="native folder of the VAE whose tokens are learned")
    group.add_argument("--bpe_path", required=True, help="tokenizer.json of train_tokenizer.py")
    group.add_argument("--dalle_path", help="native folder of a prior to go on from; its sizes count, not those below")
    group.add_argument("--dim", type=int, default=256)
    group.add_argument("--depth", type=int, default=8)
    group.add_argument("--heads", type=int, default=4)
    group.add_argument("--dim_head", type=int, default=64)
    group.add_argument("--text_seq_len", type=int, default=32)
    group.add_argument("--rotary_emb", action=argparse.BooleanOptionalAction, default=True,
                       help="rotary positions, or learned ones")  # fmt: skip
    group.add_argument("--loss_img_weight", type=float, default=7)
    group.add_argument("--null_cond_prob", type=float, default=0.1, help="share of captions dropped, for --cond_scale")
    group.add_argument(
        "--subject_weight", type=float, default=1.0, help="weight of tokens under the subject, where known"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    import torch

    from dalle_pytorch.checkpoints import PretrainedModel
    from dalle_pytorch.dalle import DALLE
    from dalle_pytorch.data import open_dataset
    from dalle_pytorch.tasks import DalleTask
    from dalle_pytorch.tokenizers import HugTokenizer

    torch.manual_seed(arguments.seed)
    tokenizer = HugTokenizer(arguments.bpe_path)
    vae = PretrainedModel.from_pretrained(arguments.vae_path)
    if arguments.dalle_path:
        dalle = DALLE.from_pretrained(arguments.dalle_path, vae=vae)
    else:
        names = ("dim", "depth", "heads", "dim_head", "text_seq_len", "rotary_emb", "loss_img_weight")
        sizes = {name: getattr(arguments, name) for name in names}
        dalle = DALLE(vae=vae, num_text_tokens=tokenizer.vocab_size, qk_norm=True, **sizes)
    task = DalleTask(dalle, tokenizer, arguments.null_cond_prob, arguments.subject_weight)
    dataset = open_dataset(arguments.image_text_folder, vae.image_size)
    run_training("DALLE", task, dataset, training_options(arguments))
    dalle.save_pretrained(Path(arguments.output_dir) / "dalle", dtype=torch.float16, save_vae=False)


if __name__ == "__main__":
    run(main)
