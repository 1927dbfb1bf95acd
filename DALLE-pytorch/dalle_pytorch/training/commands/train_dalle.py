"""Trains the prior."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, again, option
from dalle_pytorch.training.settings import CaptionSettings, ImageSettings, TrainingSettings, check_part_name


@dataclass
class ImageTokenSettings(Settings):
    title = "image tokens"

    vae_path: str | None = option(None, "VAE: a native folder of train_vae.py or train_vqgan.py, or a vae.pt",
                                  part="VAE")  # fmt: skip
    taming: bool = option(False, "the published VQGAN, if no other VAE is named (default: OpenAI's dVAE)", part="VAE")
    vqgan_model_path: str | None = option(None, "checkpoint of a VQGAN", part="VAE")
    vqgan_config_path: str | None = option(None, "its model.yaml")
    cache_tokens: str | None = option(None, "keep the images' tokens in this folder; no random crops", metavar="DIR")


@dataclass
class DalleArchitecture(Settings):
    """Arguments of `DALLE`."""

    title = "model"

    dim: int = option(256, "width", low=1)
    depth: int = option(8, "layers", low=1)
    heads: int = option(4, "attention heads", low=1)
    dim_head: int = option(64, "width of a head", low=1)
    text_seq_len: int = option(32, "tokens of a caption", low=1)
    attn_types: list[str] = option(["full"], "full, axial_row, axial_col, conv_like, sparse: one per layer, repeated "
                                             "if there are more layers", metavar="TYPE,TYPE…")  # fmt: skip
    attn_dropout: float = option(0.0, low=0, high=1)
    ff_dropout: float = option(0.0, low=0, high=1)
    reversible: bool = option(False, "memory does not grow with depth; a third slower")
    shift_tokens: bool = option(True, "mix part of the channels of neighbouring tokens; --no-shift_tokens does not",
                                flags=["--no-shift_tokens=False"])  # fmt: skip
    rotary_emb: bool = option(True, "rotary positions; --no-rotary_emb: learned ones", flags=["--no-rotary_emb=False"])
    shared_attn_ids: list[int] | None = option(None, "layers of the same number share attention", metavar="ID,ID…")
    shared_ff_ids: list[int] | None = option(None, "the same for the feed-forward part", metavar="ID,ID…")
    share_input_output_emb: bool = option(False, "tie the output layer to the embeddings")
    loss_img_weight: float = option(7, "weight of the image loss; that of the caption is 1", low=0)


@dataclass
class TrainDalleSettings(CaptionSettings, DalleArchitecture, ImageTokenSettings, ImageSettings, TrainingSettings):
    """Trains the prior on images with captions, over the tokens of a VAE, and writes it as a native folder.

        python DALLE-pytorch/train_dalle.py --image_text_folder pictures --vae_path runs/vqgan/vae \\
            --bpe_path tokenizer.json --output_dir runs/dalle
        python generate.py --dalle_path runs/dalle/dalle --text 'a red seven on brick'
    """

    title = "prior"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/dalle"))
    steps: int | None = again(TrainingSettings, "steps", 5000)
    batch_size: int = again(TrainingSettings, "batch_size", 32)
    learning_rate: float = again(TrainingSettings, "learning_rate", 1e-3)

    dalle_path: str | None = option(None, "prior to continue from, native folder or dalle.pt, with its VAE and "
                                          "tokenizer; its architecture counts, not that of the options")  # fmt: skip
    dalle_output_file_name: str = option("dalle", "the prior's folder in --output_dir", metavar="NAME")
    stable_softmax: bool = option(False, "CogView's measures against overflow in fp16")
    layer_scale: float | None = option(None, "initial scale of every residual branch (default: 0.1 in the first 18 "
                                             "layers; 1 learns faster with few layers)", low=0, above=True)  # fmt: skip
    null_cond_prob: float = option(0.1, "share of captions dropped, for --cond_scale when drawing", low=0, high=1)
    subject_weight: float = option(1.0, "loss weight of tokens under the subject, where the data has a mask", low=0)
    image_noise: float = option(0.0, "make up to this share of input tokens wrong, against overfitting", low=0, high=1)
    share_codes: bool = option(False, "image tokens of like codes learn together: fewer steps where many are rare")


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainDalleSettings.parse(argv)
    if settings.cache_tokens and settings.random_resize_crop_lower_ratio < 1:
        raise UsageError("--cache_tokens keeps one crop of every image: leave out --random_resize_crop_lower_ratio")
    check_part_name(settings.dalle_output_file_name)
    import torch

    from dalle_pytorch.data.datasets import open_dataset
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.published.dalle import load_dalle
    from dalle_pytorch.published.load import load_vae
    from dalle_pytorch.tokenizers.load import load_tokenizer
    from dalle_pytorch.training.commands.progress import run_training, token_cache
    from dalle_pytorch.training.tasks.base import LongCaption
    from dalle_pytorch.training.tasks.prior import DalleTask

    torch.manual_seed(settings.seed)
    beside = settings.dalle_path
    tokenizer = load_tokenizer(settings.bpe_path, hug=settings.hug, chinese=settings.chinese, beside=beside)
    vae = None
    if settings.dalle_path is None or settings.vae_path or settings.vqgan_model_path:
        vae = load_vae(settings.vae_path, vqgan_path=settings.vqgan_model_path,
                       vqgan_config_path=settings.vqgan_config_path, taming=settings.taming)  # fmt: skip
    if settings.dalle_path is not None:
        dalle = load_dalle(settings.dalle_path, vae=vae, taming=settings.taming)
    else:
        assert vae is not None
        dalle = DALLE(vae=vae, num_text_tokens=tokenizer.vocab_size, stable=settings.stable_softmax, qk_norm=True,
                      **settings.values(DalleArchitecture))  # fmt: skip
        if settings.layer_scale is not None:
            dalle.transformer.set_layer_scale(settings.layer_scale)
    task = DalleTask(dalle, tokenizer, settings.null_cond_prob, settings.subject_weight, settings.image_noise,
                     settings.share_codes, settings.dalle_output_file_name)  # fmt: skip
    caption_problem = None if settings.truncate_captions else LongCaption(tokenizer, dalle.text_seq_len)
    dataset = open_dataset(settings.image_text_folder, dalle.image_size,
                           transparent=dalle.vae.channels == 4, caption_problem=caption_problem,
                           **settings.dataset_options())  # fmt: skip
    if settings.cache_tokens:
        dataset = token_cache(settings.cache_tokens, dataset, dalle.vae, settings)
    run_training("DALLE", task, dataset, settings)
