"""Trains the prior on pictures with captions, over the tokens of a VAE, and writes it as a native folder.

    python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vqgan/vae \\
        --bpe_path tokenizer.json --output_dir runs/dalle
    python generate.py --dalle_path runs/dalle/dalle --text 'a red seven on brick'
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, listed, number, run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.training.cli import (
    add_caption_arguments,
    add_training_arguments,
    dataset_settings,
    is_main_process,
    run_training,
    training_options,
)

SIZES = ("dim", "depth", "heads", "dim_head", "text_seq_len", "reversible", "attn_dropout", "ff_dropout", "attn_types",
         "loss_img_weight", "shift_tokens", "rotary_emb", "shared_attn_ids", "shared_ff_ids",
         "share_input_output_emb")  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, steps=5000, batch_size=32, learning_rate=1e-3, output_dir="runs/dalle")
    flag = argparse.BooleanOptionalAction

    group = add_caption_arguments(parser)
    group.add_argument("--null_cond_prob", type=number(float, 0, 1), default=0.1,
                       help="share of captions dropped, for --cond_scale when drawing")  # fmt: skip

    group = parser.add_argument_group("image tokens")
    group.add_argument("--vae_path", help="the VAE: a native folder of train_vae.py or train_vqgan.py, or a vae.pt")
    group.add_argument("--taming", action="store_true",
                       help="the published VQGAN, if nothing else is named (default: OpenAI's dVAE)")  # fmt: skip
    group.add_argument("--vqgan_model_path", help="a VQGAN's checkpoint")
    group.add_argument("--vqgan_config_path", help="its model.yaml")
    group.add_argument("--cache_tokens", metavar="DIR",
                       help="find every picture's tokens once and keep them here; each is then learned from as it "
                            "stands, without random crops")  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--dalle_path", help="a prior to go on from, native folder or dalle.pt, with the VAE and the "
                                            "tokenizer that it has; its sizes count, not those below")  # fmt: skip
    group.add_argument("--dalle_output_file_name", default="dalle", metavar="NAME",
                       help="the folder in --output_dir that the prior is written to")  # fmt: skip
    group.add_argument("--dim", type=number(int, 1), default=256, help="width")
    group.add_argument("--depth", type=number(int, 1), default=8, help="layers")
    group.add_argument("--heads", type=number(int, 1), default=4, help="attention heads")
    group.add_argument("--dim_head", type=number(int, 1), default=64, help="width of a head")
    group.add_argument("--text_seq_len", type=number(int, 1), default=32, help="tokens of a caption")
    group.add_argument("--attn_types", type=listed(str), default=["full"], metavar="TYPE,TYPE…",
                       help="full, axial_row, axial_col, conv_like, sparse: one for each layer, from the first again "
                            "when there are more")  # fmt: skip
    group.add_argument("--attn_dropout", type=number(float, 0, 1), default=0.0)
    group.add_argument("--ff_dropout", type=number(float, 0, 1), default=0.0)
    group.add_argument("--reversible", action="store_true", help="memory does not grow with depth; a third slower")
    group.add_argument("--shift_tokens", action=flag, default=True,
                       help="neighbours lend each token a part of their channels")  # fmt: skip
    group.add_argument("--rotary_emb", action=flag, default=True,
                       help="rotary positions, or learned ones")  # fmt: skip
    group.add_argument("--shared_attn_ids", type=listed(int), metavar="ID,ID…",
                       help="layers of the same number share their attention (default: none do)")  # fmt: skip
    group.add_argument("--shared_ff_ids", type=listed(int), metavar="ID,ID…", help="the same of the feed-forward part")
    group.add_argument("--share_input_output_emb", action="store_true", help="embeddings are the output layer's rows")
    group.add_argument("--stable_softmax", action="store_true", help="CogView's measures against overflow in fp16")

    group.add_argument("--layer_scale", type=number(float, 0, above=True),
                       help="the first scale of every residual branch (default: 0.1 in the first 18 layers, as ever; "
                            "1 learns faster where there are few)")  # fmt: skip

    group = parser.add_argument_group("loss")
    group.add_argument("--loss_img_weight", type=number(float, 0), default=7,
                       help="weight of the picture against the caption's 1")  # fmt: skip
    group.add_argument("--subject_weight", type=number(float, 0), default=1.0,
                       help="weight of tokens under the subject, where the data tells")  # fmt: skip
    group.add_argument("--image_noise", type=number(float, 0, 1), default=0.0,
                       help="show up to this share of tokens wrong: against learning by heart")  # fmt: skip
    return parser.parse_args(argv)


def keep_tokens(arguments: argparse.Namespace, dataset: Any, vae: Any) -> Any:
    """The data set of image tokens in `--cache_tokens`, found first where they are not there yet."""
    import torch
    from tqdm import tqdm

    from dalle_pytorch.data.token_cache import cache_tokens

    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    from dalle_pytorch.devices import pick_device

    vae.to(pick_device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))
    with tqdm(desc="image tokens", unit="picture", dynamic_ncols=True, disable=not is_main_process()) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return cache_tokens(
            arguments.cache_tokens, dataset, vae, batch_size=arguments.batch_size, num_workers=arguments.num_workers,
            rank=int(rank), world_size=int(os.environ.get("WORLD_SIZE", "1")), progress=progress,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.cache_tokens and arguments.random_resize_crop_lower_ratio < 1:
        raise UsageError("--cache_tokens keeps one cut of every picture: --random_resize_crop_lower_ratio has no place")
    if Path(arguments.dalle_output_file_name).name != arguments.dalle_output_file_name:
        raise UsageError("--dalle_output_file_name is the name of a folder in --output_dir, and no path")
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.published.dalle import load_dalle
    from dalle_pytorch.published.load import load_vae
    from dalle_pytorch.tokenizers.load import load_tokenizer
    from dalle_pytorch.training.tasks.base import LongCaption
    from dalle_pytorch.training.tasks.prior import DalleTask

    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer(
        arguments.bpe_path, hug=arguments.hug, chinese=arguments.chinese, beside=arguments.dalle_path
    )
    vae = None
    if arguments.dalle_path is None or arguments.vae_path or arguments.vqgan_model_path:
        vae = load_vae(arguments.vae_path, vqgan_path=arguments.vqgan_model_path,
                       vqgan_config_path=arguments.vqgan_config_path, taming=arguments.taming)  # fmt: skip
    if arguments.dalle_path is not None:
        dalle = load_dalle(arguments.dalle_path, vae=vae, taming=arguments.taming)
    else:
        sizes = {name: getattr(arguments, name) for name in SIZES}
        dalle = DALLE(
            vae=vae, num_text_tokens=tokenizer.vocab_size, stable=arguments.stable_softmax, qk_norm=True, **sizes
        )
        if arguments.layer_scale is not None:
            dalle.transformer.set_layer_scale(arguments.layer_scale)
    task = DalleTask(
        dalle,
        tokenizer,
        arguments.null_cond_prob,
        arguments.subject_weight,
        arguments.image_noise,
        arguments.dalle_output_file_name,
    )
    dataset = open_dataset(
        arguments.image_text_folder,
        dalle.image_fmap_size * 2**dalle.vae.num_layers,
        **dataset_settings(arguments),
        transparent=getattr(dalle.vae, "channels", 3) == 4,
        caption_problem=None if arguments.truncate_captions else LongCaption(tokenizer, dalle.text_seq_len),
        terse_every=6,
    )
    if arguments.cache_tokens:
        dataset = keep_tokens(arguments, dataset, dalle.vae)
    run_training("DALLE", task, dataset, training_options(arguments))


if __name__ == "__main__":
    run(main)
