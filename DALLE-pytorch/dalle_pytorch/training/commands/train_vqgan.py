"""Trains a Gumbel-VQGAN."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, again, option
from dalle_pytorch.training.settings import ImageSettings, TrainingSettings, total_steps


@dataclass
class VQGanArchitecture(Settings):
    """Arguments of `VQGanVAE`."""

    title = "model"

    image_size: int = option(128, "side of an image in pixels", low=1)
    num_tokens: int = option(512, "size of the codebook", low=2)
    embed_dim: int = option(16, "width of a codebook row", low=1)
    ch: int = option(64, "width of the convolutions at the finest level", low=1)
    ch_mult: list[int] = option([1, 2], "widths in --ch; each but the first halves the side", nargs="+", low=1)
    num_res_blocks: int = option(1, "residual blocks per level", low=1)
    attn_resolutions: list[int] = option([], "sides of feature maps with attention", nargs="*", low=1)
    mid_attention: bool = option(False, "attention in the middle")
    dropout: float = option(0.0, low=0, high=1)
    patch_size: int = option(4, "fold this many pixels, each way, into channels before the first convolution", low=1)
    local_encoder: bool = option(False, "a token depends on its own square of pixels alone: easier for a prior")


@dataclass
class TrainVQGanSettings(VQGanArchitecture, ImageSettings, TrainingSettings):
    """Trains a Gumbel-VQGAN on images, which need no captions, and writes it as a native folder.

        python DALLE-pytorch/train_vqgan.py --image_folder pictures --image_size 128 --output_dir runs/vqgan
        python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vqgan/vae

    The default network is some ten times cheaper than the published one, which has

        --image_size 256 --num_tokens 8192 --embed_dim 256 --ch 128 --ch_mult 1 1 2 4 --num_res_blocks 2
        --attn_resolutions 32 --mid_attention --patch_size 1 --crop_size 256
    """

    title = "losses"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/vqgan"))
    steps: int | None = again(TrainingSettings, "steps", 6000)
    batch_size: int = again(TrainingSettings, "batch_size", 64)
    learning_rate: float = again(TrainingSettings, "learning_rate", 1e-3)

    crop_size: int = option(64, "train mostly on crops of this many pixels", low=1)
    starting_temp: float = option(0.5, "initial temperature at which codes are drawn; 0 for the last third", low=0)
    disc_weight: float = option(0.2, "length of the adversarial gradient relative to the others'; 0: none", low=0)
    disc_start: int | None = option(None, "step at which the discriminator starts (default: half way)", low=0)
    disc_num_layers: int = option(3, "2, 3, 4 layers judge patches of 34, 70, 142 pixels a side", low=1)
    disc_ch: int = option(64, "width of the discriminator's first layer", low=1)
    perceptual_weight: float = option(1.0, "weight of the perceptual loss", low=0)
    perceptual_clip: str | None = option(None, "CLIP of the perceptual loss (default: no such loss)", metavar="PATH",
                                         part="CLIP")  # fmt: skip
    clip_config: str | None = option(None, "its open_clip architecture where its files do not tell it, such as "
                                           "ViT-H-14, or its JSON file", metavar="NAME|FILE")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainVQGanSettings.parse(argv)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.published.clip import load_clip
    from dalle_pytorch.training.commands.progress import is_main_process, run_training
    from dalle_pytorch.training.losses import Adversary, PatchDiscriminator, PerceptualLoss
    from dalle_pytorch.training.tasks.vqgan import VQGanTask
    from dalle_pytorch.vae.vqgan import VQGanVAE

    torch.manual_seed(settings.seed)
    vae = VQGanVAE(z_channels=settings.embed_dim, **settings.values(VQGanArchitecture))
    vae.to(memory_format=torch.channels_last)
    adversary = perceptual = None
    if settings.disc_weight > 0:
        discriminator = PatchDiscriminator(ch=settings.disc_ch, num_layers=settings.disc_num_layers)
        adversary = Adversary(discriminator, settings.disc_weight)
    if settings.perceptual_clip and settings.perceptual_weight > 0:
        perceptual = PerceptualLoss(load_clip(settings.perceptual_clip, settings.clip_config))
    dataset = open_dataset(settings.image_text_folder, settings.image_size, captions=False,
                           **settings.dataset_options())  # fmt: skip
    steps, start = total_steps(settings, dataset), settings.disc_start
    if steps is None:
        raise UsageError("the temperature falls over the whole run, whose length shards do not tell: give --steps")
    task = VQGanTask(
        vae, steps=steps * settings.ga_steps, crop_size=settings.crop_size, starting_temp=settings.starting_temp,
        adversary=adversary, adversary_start=None if start is None else start * settings.ga_steps,
        perceptual=perceptual, perceptual_weight=settings.perceptual_weight,
    )  # fmt: skip
    if is_main_process():
        features = f"features of {settings.perceptual_clip}" if perceptual else "none"
        print(f"adversarial loss: {'patches' if adversary else 'none'}; perceptual loss: {features}")
    run_training("VQGAN", task, dataset, settings)
