"""Trains a CLIP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.settings import Settings, again, option
from dalle_pytorch.training.settings import CaptionSettings, ImageSettings, TrainingSettings


@dataclass
class ClipArchitecture(Settings):
    """Arguments of `CLIP`."""

    title = "model"

    dim_text: int = option(128, "width of the text transformer", low=1)
    dim_image: int = option(192, "width of the image transformer", low=1)
    dim_latent: int = option(128, "width of the features", low=1)
    text_seq_len: int = option(32, "tokens of a caption", low=1)
    text_enc_depth: int = option(2, "layers", low=1)
    text_heads: int = option(2, "attention heads", low=1)
    text_dim_head: int = option(64, "width of a head", low=1)
    visual_enc_depth: int = option(4, "layers", low=1)
    visual_heads: int = option(3, "attention heads", low=1)
    visual_dim_head: int = option(64, "width of a head", low=1)
    visual_image_size: int = option(128, "side of an image in pixels", low=1)
    visual_patch_size: int = option(16, "side of a patch in pixels", low=1)
    visual_patch_dropout: float = option(0.0, "share of the patches dropped in training", low=0, high=1)
    visual_conv_stem: bool = option(False, "embed patches by convolutions, which learn shapes sooner")
    visual_attention_pool: bool = option(False, "pool patches by attention, which finds small things sooner")


@dataclass
class TrainClipSettings(ClipArchitecture, CaptionSettings, ImageSettings, TrainingSettings):
    """Trains a CLIP, for ranking and guidance, on images with captions and writes it as a native folder.

    python DALLE-pytorch/train_clip.py --image_text_folder pictures --bpe_path tokenizer.json --output_dir runs/clip
    """

    title = "model"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/clip"))
    steps: int | None = again(TrainingSettings, "steps", 2000)
    batch_size: int = again(TrainingSettings, "batch_size", 128)
    learning_rate: float = again(TrainingSettings, "learning_rate", 1e-3)

    clip_path: str | None = option(None, "CLIP to continue from, a native folder; its architecture counts, not that of "
                                         "the options")  # fmt: skip
    layer_scale: float | None = option(None, "initial scale of every residual branch (default: 0.1 in the first 18 "
                                             "layers; 1 learns faster with few layers)", low=0, above=True)  # fmt: skip
    dalle_path: str | None = option(None, "prior whose samples are to be ranked: it redraws half of the images, "
                                          "which then have its faults")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainClipSettings.parse(argv)
    import torch

    from dalle_pytorch.clip.trainable import CLIP
    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.data.registry import RegisteredDataset
    from dalle_pytorch.published.load import load_prior
    from dalle_pytorch.tokenizers.load import load_tokenizer
    from dalle_pytorch.training.commands.progress import run_training
    from dalle_pytorch.training.tasks.base import LongCaption
    from dalle_pytorch.training.tasks.clip import ClipTask

    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(settings.bpe_path, hug=settings.hug, chinese=settings.chinese, beside=settings.clip_path)
    if settings.clip_path is not None:
        clip = CLIP.from_pretrained(settings.clip_path)
    else:
        clip = CLIP(num_text_tokens=tokenizer.vocab_size, **settings.values(ClipArchitecture))
        if settings.layer_scale is not None:
            clip.text_transformer.set_layer_scale(settings.layer_scale)
            clip.visual_transformer.set_layer_scale(settings.layer_scale)
        clip.temperature.data.fill_(math.log(1 / 0.07))  # as in the paper, arXiv:2103.00020
    clip.tokenizer = tokenizer
    prior, image_size = None, clip.image_size
    if settings.dalle_path is not None:
        prior = load_prior(settings.dalle_path)
        prior.tokenizer = prior.tokenizer or tokenizer
        image_size = max(image_size, prior.image_size)
    caption_problem = None if settings.truncate_captions else LongCaption(tokenizer, clip.text_seq_len)
    dataset = open_dataset(settings.image_text_folder, image_size, caption_problem=caption_problem,
                           **settings.dataset_options())  # fmt: skip
    attributes = dataset.attributes if isinstance(dataset, RegisteredDataset) else ()
    run_training("CLIP", ClipTask(clip, attributes=attributes, prior=prior), dataset, settings)
