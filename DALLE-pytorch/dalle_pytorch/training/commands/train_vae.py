"""Trains a DiscreteVAE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.settings import again, option
from dalle_pytorch.training.settings import ImageSettings, TrainingSettings


@dataclass
class TrainVaeSettings(ImageSettings, TrainingSettings):
    """Trains a DiscreteVAE on images, which need no captions, and writes it as a native folder.

        python DALLE-pytorch/train_vae.py --image_folder pictures --image_size 128 --output_dir runs/vae
        python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vae/vae

    Flags and defaults are DALLE-pytorch's.
    """

    title = "model"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/vae"))
    epochs: int | None = again(TrainingSettings, "epochs", 20)
    learning_rate: float = again(TrainingSettings, "learning_rate", 1e-3)
    warmup_steps: int = again(TrainingSettings, "warmup_steps", 0)
    weight_decay: float = again(TrainingSettings, "weight_decay", 0.0)
    lr_decay: str = again(TrainingSettings, "lr_decay", "exponential")

    image_size: int = option(128, "side of an image in pixels", low=1)
    num_tokens: int = option(8192, "size of the codebook", low=2)
    num_layers: int = option(3, "halvings: a token covers 2^num_layers pixels each way", low=1)
    num_resnet_blocks: int = option(2, "residual blocks each way", low=0)
    emb_dim: int = option(512, "width of a codebook row", low=1)
    hidden_dim: int = option(256, "width of the convolutions", low=1)
    transparent: bool = option(False, "images with an alpha channel, kept as a fourth")

    starting_temp: float = option(1.0, "initial temperature of the Gumbel-softmax", low=0, above=True)
    temp_min: float = option(0.5, "final temperature", low=0, above=True)
    anneal_rate: float = option(1e-6, "every 100 steps multiply the temperature by exp(-anneal_rate * step)", low=0)
    straight_through: bool = option(False, "one code in the forward pass, the gradient of the mixture")
    kl_loss_weight: float = option(0.0, "weight of the KL divergence from a uniform use of the codes", low=0)
    smooth_l1_loss: bool = option(False, "instead of the mean squared error")
    num_images_save: int = option(4, "images in a preview", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainVaeSettings.parse(argv)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.training.commands.progress import run_training
    from dalle_pytorch.training.tasks.discrete import DiscreteVAETask
    from dalle_pytorch.vae.discrete import DiscreteVAE

    torch.manual_seed(settings.seed)
    alpha = (0.0,) if settings.transparent else ()  # opacity is left as it is, between 0 and 1
    vae = DiscreteVAE(
        image_size=settings.image_size, num_tokens=settings.num_tokens, codebook_dim=settings.emb_dim,
        num_layers=settings.num_layers, num_resnet_blocks=settings.num_resnet_blocks, hidden_dim=settings.hidden_dim,
        channels=3 + len(alpha), smooth_l1_loss=settings.smooth_l1_loss, straight_through=settings.straight_through,
        kl_div_loss_weight=settings.kl_loss_weight,
        normalization=((0.5, 0.5, 0.5, *alpha), (0.5, 0.5, 0.5, *(1.0 for _ in alpha))),
    )  # fmt: skip
    task = DiscreteVAETask(vae, starting_temp=settings.starting_temp, temp_min=settings.temp_min,
                           anneal_rate=settings.anneal_rate, num_images_save=settings.num_images_save)  # fmt: skip
    dataset = open_dataset(settings.image_text_folder, settings.image_size, captions=False,
                           transparent=settings.transparent, **settings.dataset_options())  # fmt: skip
    run_training("VAE", task, dataset, settings)
