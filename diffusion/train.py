"""Trains a diffusion decoder or a super-resolution network (--help)."""

from collections.abc import Sequence

from dalle_pytorch.cli import run
from diffusion.settings import TrainDiffusionSettings


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainDiffusionSettings.parse(argv)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.training.commands.progress import run_training
    from diffusion.tasks import make_decoder_task, make_super_resolution_task

    torch.manual_seed(settings.seed)
    task = make_super_resolution_task(settings) if settings.super_res else make_decoder_task(settings)
    dataset = open_dataset(
        settings.image_text_folder, task.denoiser.network.image_size, **settings.dataset_options(), captions=False
    )
    run_training("super-resolution" if settings.super_res else "decoder", task, dataset, settings)


if __name__ == "__main__":
    run(main)
