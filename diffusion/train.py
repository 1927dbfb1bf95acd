"""Trains a diffusion decoder for a VAE's tokens, or with --super_res a network that enlarges pictures, and writes it as
a native folder. Flags under guided-diffusion's names are taken too.

    python diffusion/train.py --image_text_folder pictures --vae_path runs/vae/vae --output_dir runs/decoder
    python upscale.py --model_path runs/decoder/decoder --input outputs/a_red_seven_on_brick

    python diffusion/train.py --image_text_folder pictures --super_res --image_size 1024 --output_dir runs/super_res
    python upscale.py --super_res_path runs/super_res/super_res --input outputs/a_red_seven_on_brick
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, boolean, listed, number, run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.training.cli import add_training_arguments, dataset_settings, run_training, training_options

DIFFUSION = ("diffusion_steps", "noise_schedule", "predict_xstart", "sigma_small", "rescale_timesteps",
             "residual_std")  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_training_arguments(parser, steps=12_000, batch_size=16, learning_rate=1e-3, output_dir="runs/decoder")
    parser.set_defaults(ema_decay=0.999, weight_decay=0.0, num_workers=2)
    switch = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}

    group = parser.add_argument_group("what is learned")
    group.add_argument("--vae_path", help="the VAE whose tokens are decoded: a native folder, a vae.pt, a VQGAN")
    group.add_argument("--vqgan_config_path", help="the model.yaml of a VQGAN")
    group.add_argument("--super_res", action="store_true", help="learn to enlarge pictures instead")
    group.add_argument("--small_size", type=number(int, 1),
                       help="of --super_res, the small picture's side in pixels (default: a quarter)")  # fmt: skip
    group.add_argument("--crop_size", type=number(int, 1), default=128,
                       help="train mostly on crops of this many pixels")  # fmt: skip
    group.add_argument("--resume_checkpoint", metavar="PATH",
                       help="weights to begin with: a native folder, whose settings count and not those below, or a "
                            ".pt of guided-diffusion's, which they describe")  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--image_size", "--large_size", type=number(int, 1), default=256,
                       help="side in pixels of the pictures it draws")  # fmt: skip
    group.add_argument("--num_channels", type=number(int, 32), default=64, help="width at the finest level")
    group.add_argument("--channel_mult", type=listed(float), nargs="+", default=[1, 1.5, 2],
                       help="times that at each level")  # fmt: skip
    group.add_argument("--num_res_blocks", type=number(int, 1), default=1, help="residual blocks a level")
    group.add_argument("--attention_resolutions", type=listed(int), nargs="*", default=[],
                       help="sides of feature maps that attend, besides the middle's")  # fmt: skip
    group.add_argument("--num_heads", type=number(int, 1), default=4, help="attention heads")
    group.add_argument("--num_head_channels", type=int, default=-1, help="width of a head, in place of --num_heads")
    group.add_argument("--num_heads_upsample", type=int, default=-1, help="heads of the second half, if others")
    group.add_argument("--use_new_attention_order", default=True, **switch)
    group.add_argument("--use_scale_shift_norm", default=True, **switch, help="the time scales and shifts")
    group.add_argument("--resblock_updown", default=False, **switch, help="resample inside residual blocks")
    group.add_argument("--patch_size", type=number(int, 1), default=4,
                       help="fold so many pixels, each way, into channels (guided-diffusion's are 1)")  # fmt: skip
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.0)
    group.add_argument("--emb_condition", default=True, **switch, help="tell the codebook's rows")
    group.add_argument("--emb_output_dims", type=number(int, 1), default=64,
                       help="channels by which they join the middle")  # fmt: skip
    group.add_argument("--low_res_condition", default=True, **switch, help="tell the VAE's own decoding")
    group.add_argument("--class_cond", default=False, **switch, help="must be False: nothing here names classes")

    group = parser.add_argument_group("diffusion")
    group.add_argument("--diffusion_steps", type=number(int, 1), default=1000)
    group.add_argument("--noise_schedule", choices=["linear", "cosine"], default="cosine")
    group.add_argument("--predict", choices=["residual", "x_0", "eps"],
                       help="what the network predicts; residual is how x_0 differs from the VAE's decoding, or from "
                            "the small picture (default: that where it is told one, or else x_0)")  # fmt: skip
    group.add_argument("--residual_std", type=number(float, 0, above=True), default=0.15,
                       help="how large residuals are, in pictures of [-1, 1]")  # fmt: skip
    group.add_argument("--predict_xstart", **switch, help="the same as --predict x_0, or with False as eps")
    group.add_argument("--learn_sigma", default=False, **switch, help="learn the variance too")
    group.add_argument("--sigma_small", default=False, **switch, help="of a fixed variance, the smaller one")
    group.add_argument("--use_kl", default=False, **switch, help="the variational bound as the loss")
    group.add_argument("--rescale_timesteps", default=True, **switch, help="tell steps of a thousand")
    group.add_argument("--schedule_sampler", choices=["uniform", "quadratic", "loss-second-moment"],
                       help="how often each step is trained on: alike, as upscale.py visits them, or by its loss "
                            "(default: quadratic for residuals, or else uniform)")  # fmt: skip
    group.add_argument("--timestep_respacing", default="", help="must be empty: upscale.py --steps says it instead")

    group = parser.add_argument_group("training, under guided-diffusion's names")
    for flag, name, kind in (
        ("--data_dir", "image_text_folder", str),
        ("--lr", "learning_rate", number(float, 0, above=True)),
        ("--lr_warmup_steps", "warmup_steps", number(int, 0)),
        ("--lr_anneal_steps", "steps", number(int, 1)),
        ("--ema_rate", "ema_decay", number(float, 0, 1)),
        ("--log_interval", "log_every", number(int, 1)),
        ("--save_interval", "save_every", number(int, 1)),
    ):
        group.add_argument(flag, dest=name, type=kind, default=argparse.SUPPRESS, help=f"the same as --{name}")
    group.add_argument("--microbatch", type=int, default=-1,
                       help="work on so many pictures of --batch_size at once, which changes memory alone")  # fmt: skip
    group.add_argument("--use_fp16", default=False, **switch, help="the same as --fp16")
    group.add_argument("--use_checkpoint", default=False, **switch, help="the same as --activation_checkpointing")
    return parser.parse_args(argv)


def settle(arguments: argparse.Namespace) -> argparse.Namespace:
    """guided-diffusion's ways of saying things into the one that is used here. Raises `UsageError` for what is not."""
    if arguments.class_cond:
        raise UsageError("--class_cond is not supported: captions and tokens are learned here, and no classes")
    if arguments.timestep_respacing:
        raise UsageError("--timestep_respacing has no place in training; upscale.py takes --steps")
    if not arguments.super_res and arguments.small_size:
        raise UsageError("--small_size goes with --super_res")
    # Numbers between commas, between blanks, or both.
    for name in ("attention_resolutions", "channel_mult"):
        parts = getattr(arguments, name)
        setattr(arguments, name, list(chain.from_iterable(p if isinstance(p, list) else [p] for p in parts)))
    told_picture = arguments.low_res_condition or arguments.super_res
    if arguments.predict_xstart is not None and arguments.predict is None:
        arguments.predict = "x_0" if arguments.predict_xstart else "eps"
    arguments.predict = arguments.predict or ("residual" if told_picture else "x_0")
    if arguments.predict == "residual" and not told_picture:
        raise UsageError("--predict residual wants --low_res_condition: residuals are of the VAE's decoding")
    arguments.predict_xstart = arguments.predict == "x_0"
    arguments.schedule_sampler = arguments.schedule_sampler or (
        "quadratic" if arguments.predict == "residual" else "uniform"
    )
    arguments.residual_std = arguments.residual_std if arguments.predict == "residual" else None
    if arguments.microbatch > 0:
        if arguments.batch_size % arguments.microbatch:
            raise UsageError(f"--microbatch {arguments.microbatch} does not divide --batch_size {arguments.batch_size}")
        arguments.ga_steps *= arguments.batch_size // arguments.microbatch
        arguments.batch_size = arguments.microbatch
    if arguments.use_fp16:
        arguments.mixed_precision = "fp16"
    arguments.activation_checkpointing |= arguments.use_checkpoint
    return arguments


def make_unet(arguments: argparse.Namespace, **conditioning: Any) -> Any:
    """The network that the flags describe, with the weights of `--resume_checkpoint`, or a native folder's network."""
    from dalle_pytorch.pretrained import load_state
    from dalle_pytorch.published.unpickler import read_torch, tensor_dict
    from diffusion.unet import UNet

    names = ("image_size", "num_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads",
             "num_head_channels", "num_heads_upsample", "use_new_attention_order", "use_scale_shift_norm",
             "resblock_updown", "patch_size", "dropout", "learn_sigma")  # fmt: skip
    settings = {name: getattr(arguments, name) for name in names}
    unet = UNet(**settings, gated=arguments.residual_std is not None, **conditioning)
    path = arguments.resume_checkpoint
    if path is not None:
        load_state(unet, tensor_dict(read_torch(path), path), source=path)
    return unet


def make_decoder_task(arguments: argparse.Namespace) -> Any:
    import torch

    from dalle_pytorch.published.load import load_vae
    from dalle_pytorch.published.vaes import load_vqgan
    from diffusion.decoder import DiffusionDecoder
    from diffusion.tasks import DecoderTask

    vae = None
    if arguments.vae_path is not None:
        config = arguments.vqgan_config_path
        vae = load_vqgan(arguments.vae_path, config) if config else load_vae(arguments.vae_path)
    if from_folder(arguments):
        given = {} if vae is None else {"vae": vae}
        decoder = DiffusionDecoder.from_pretrained(arguments.resume_checkpoint, **given)
    elif vae is None:
        raise UsageError("--vae_path is wanted: the VAE whose tokens are to be decoded")
    elif getattr(vae, "channels", 3) != 3:
        raise UsageError(f"{arguments.vae_path} is a VAE of pictures with opacity, and the decoder draws opaque ones")
    else:
        middle = arguments.image_size // arguments.patch_size // 2 ** (len(arguments.channel_mult) - 1)
        unet = make_unet(
            arguments,
            emb_condition=arguments.emb_condition,
            emb_input_dims=vae.embed(torch.zeros(1, 1, dtype=torch.long)).shape[1],
            emb_output_dims=arguments.emb_output_dims,
            emb_stride=max(1, vae.image_size // 2**vae.num_layers // max(1, middle)),
            low_res_condition=arguments.low_res_condition,
        )
        decoder = DiffusionDecoder(unet, vae, **{name: getattr(arguments, name) for name in DIFFUSION})
    decoder.unet.to(memory_format=torch.channels_last)
    return DecoderTask(decoder, arguments.crop_size, step_sampler=arguments.schedule_sampler, use_kl=arguments.use_kl)


def make_super_resolution_task(arguments: argparse.Namespace) -> Any:
    import torch

    from diffusion.published import read_diffusion
    from diffusion.tasks import SuperResolutionTask
    from diffusion.unet import UNet

    diffusion = {name: getattr(arguments, name) for name in DIFFUSION}
    if from_folder(arguments):
        unet = UNet.from_pretrained(arguments.resume_checkpoint)
        diffusion |= read_diffusion(arguments.resume_checkpoint)
    else:
        unet = make_unet(arguments, low_res_condition=True)
    unet.to(memory_format=torch.channels_last)
    return SuperResolutionTask(
        unet, arguments.small_size or unet.image_size // 4, diffusion, arguments.crop_size,
        step_sampler=arguments.schedule_sampler, use_kl=arguments.use_kl,
    )  # fmt: skip


def from_folder(arguments: argparse.Namespace) -> bool:
    return arguments.resume_checkpoint is not None and Path(arguments.resume_checkpoint).is_dir()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = settle(parse_arguments(argv))
    import torch

    from dalle_pytorch.data.datasets import open_dataset

    torch.manual_seed(arguments.seed)
    task = make_super_resolution_task(arguments) if arguments.super_res else make_decoder_task(arguments)
    dataset = open_dataset(
        arguments.image_text_folder,
        task.denoiser.network.image_size,
        **dataset_settings(arguments),
        captions=False,
    )
    run_training("super-resolution" if arguments.super_res else "decoder", task, dataset, training_options(arguments))


if __name__ == "__main__":
    run(main)
