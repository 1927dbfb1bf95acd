"""The command `generate`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dalle_pytorch.errors import UsageError, shorten
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.settings import Settings, name_value, option
from text_to_image.inputs import read_prompts
from text_to_image.settings import DTYPE_HELP


@dataclass
class _Prompts(Settings):
    title: ClassVar[str] = "what to draw"
    text: str | None = option(None, "the prompt; | separates several")
    prompts: Path | None = option(None, "a file of prompts, one a line", metavar="FILE")


@dataclass
class _Sampling(Settings):
    title: ClassVar[str] = "sampling (without these, the model's own settings)"
    num_images: int = option(16, "candidates per prompt", low=1)
    batch_size: int = option(32, "candidates sampled at once", low=1)
    top_k: float | None = option(None, "below 1: the fraction of tokens cut away; a whole number: the tokens kept. "
                                       "Wins over --top_p", low=0)  # fmt: skip
    top_p: float | None = option(None, "sample from the most likely tokens of this share", low=0, high=1, above=True)
    temperature: float | None = option(None, "0 takes the most likely token", low=0)
    cond_scale: float | None = option(None, "guidance by the prompt; 1 is none", low=0)
    seed: int = option(0, "candidate i is the same under a seed, however many are sampled", high=2**64)
    gentxt: bool = option(False, "let the model complete the prompt first")
    image: Path | None = option(None, "complete this image, of which the top rows are kept", metavar="FILE")
    num_init_img_tokens: int | None = option(None, "tokens kept of --image (default: 7 rows of 16)", low=0)


@dataclass
class _Output(Settings):
    title: ClassVar[str] = "output"
    outputs_dir: Path = option(Path("outputs"), "a folder per prompt is made here")
    clip_sort: bool = option(False, "rank with CLIP, best first; the score is in the file name")
    keep: int | None = option(None, "write only the best K", low=1, metavar="K")
    overwrite: bool = option(False, "draw those of --prompts again that are finished, with the same settings")
    output_npy: bool = option(False, "write each image's tokens beside it, for upscale.py")


@dataclass
class _Models(Settings):
    title: ClassVar[str] = "models (without these, the default model)"
    dalle_path: str | None = option(None, "a native folder, a dalle.pt, or min-dalle, min-dalle-mega or mindall-e")
    prior_flags: list = option([], "what the files of --dalle_path do not tell, such as heads=16; start_token=pypi for "
                                   "the pictures of min-dalle on PyPI", kind=name_value, nargs="+",
                               metavar="NAME=VALUE")  # fmt: skip
    low_memory: bool = option(False, "release the prior's text encoder after each prompt")
    vqgan_model_path: str | None = option(None, "a VQGAN in place of the one that the prior names")
    vqgan_config_path: str | None = option(None, "its model.yaml")
    taming: bool = option(False, "the published VQGAN in place of the one that the prior names")
    bpe_path: str | None = option(None, "tokenizer: a .model of YouTokenToMe, or with --hug a tokenizer.json")
    hug: bool = option(False, "--bpe_path is a tokenizer.json")
    chinese: bool = option(False, "the BERT Chinese tokenizer")
    clip_path: str | None = option(None, "the CLIP that ranks: a native folder, OpenAI's or open_clip's file, a hub "
                                         "name")  # fmt: skip
    clip_config: str | None = option(None, "open_clip's architecture of --clip_path where its files do not tell it, "
                                           "such as ViT-H-14, or its JSON file", metavar="NAME|FILE")  # fmt: skip
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, "cpu, cuda, cuda:1 … (default: a GPU if there is one)")


@dataclass
class GenerateSettings(_Models, _Output, _Sampling, _Prompts):
    """Stage 1: a prompt becomes ranked candidate images and, with --output_npy, the tokens that upscale.py redraws.

    python generate.py --text 'a red seven on brick|a blue star on wood' --num_images 64 --clip_sort --output_npy
    """

    def __post_init__(self) -> None:
        if (self.text is None) == (self.prompts is None):
            raise UsageError("expected one of --text and --prompts")
        if self.num_init_img_tokens is not None and self.image is None:
            raise UsageError("--num_init_img_tokens goes with --image")
        if self.vqgan_config_path and not self.vqgan_model_path:
            raise UsageError("--vqgan_config_path goes with --vqgan_model_path")
        if self.clip_config and not self.clip_path:
            raise UsageError("--clip_config goes with --clip_path")


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Runs the command line; returns the folders written, one a prompt."""
    settings = GenerateSettings.parse(argv)
    prompts = read_prompts(settings.text, settings.prompts)

    from text_to_image.pipeline import TextToImage
    from text_to_image.progress import ProgressBar
    from text_to_image.results import claim_folder, find_folder, is_finished, make_writable

    pipe = TextToImage.from_pretrained(
        device=settings.device, prior=settings.dalle_path, low_memory=settings.low_memory,
        prior_flags=dict(settings.prior_flags), vae=settings.vqgan_model_path,
        vqgan_config_path=settings.vqgan_config_path, taming=settings.taming, tokenizer=settings.bpe_path,
        hug=settings.hug, chinese=settings.chinese, scorer=settings.clip_path,
        clip_config=settings.clip_config, dtype=settings.dtype,
    )  # fmt: skip
    pipe.model.open("prior", *(["scorer"] if settings.clip_sort else []))
    sampling = {name: vars(settings)[name] for name in ("top_k", "top_p", "temperature", "cond_scale")}
    init_image = settings.image and pipe.encode_init_image(settings.image, settings.num_init_img_tokens)

    make_writable(settings.outputs_dir)
    folders = []
    for prompt in prompts:
        if settings.gentxt:
            prompt = pipe.complete_prompt(prompt, seed=settings.seed, **sampling)
            print(f"the prompt goes on: {prompt}")
        if unknown := pipe.model.unknown_words(prompt):
            words = ", ".join(shorten(word, 40) for word in unknown[:12]) + (" …" if len(unknown) > 12 else "")
            print(f"warning: this model has never seen: {words}", file=sys.stderr)
        if lost := pipe.model.prior.lost_text(prompt):
            print(f"warning: this model does not read beyond {pipe.model.prior.text_seq_len} tokens; left out: "
                  f"{shorten(lost, 200)}", file=sys.stderr)  # fmt: skip
        made_with = pipe.made_with(prompt, settings.num_images, keep=settings.keep, rank=settings.clip_sort,
                                   seed=settings.seed, init_image_tokens=init_image, **sampling)  # fmt: skip
        folder = find_folder(settings.outputs_dir, prompt)
        if settings.prompts and not settings.overwrite and is_finished(folder, made_with, settings.output_npy):
            print(f"{folder}: finished before; --overwrite draws it again")
            folders.append(folder)
            continue
        started = time.monotonic()
        with ProgressBar(prompt[:40], "token") as bar:
            result = pipe.generate(
                prompt, settings.num_images, keep=settings.keep, rank=settings.clip_sort, seed=settings.seed,
                batch_size=settings.batch_size, init_image=init_image, progress=bar, **sampling,
            )  # fmt: skip
        folder = claim_folder(settings.outputs_dir, prompt)
        if stale := result.write(folder, tokens=settings.output_npy, made_with=made_with):
            print(f"{folder}: moved to stale/, as they belong to other tokens: {shorten(', '.join(stale), 200)}")
        seconds = time.monotonic() - started
        best = "" if result[0].score is None else f", best score {result[0].score:.4f}"
        print(f"{folder}: kept {len(result)} of {settings.num_images} candidates in {seconds:.1f} s{best}")
        folders.append(folder)
    return folders
