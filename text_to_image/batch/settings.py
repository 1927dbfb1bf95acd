"""Settings of a job. torch is not imported, so that a command line prints its help at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dalle_pytorch.errors import UsageError
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.settings import Settings, name_value, option
from text_to_image.batch.ray_settings import RayCluster
from text_to_image.settings import DTYPE_HELP

SAMPLERS = ("ddim", "ddpm", "dpm++", "unipc")
COLUMNS = ("key", "prompt", "seed", "num_images", "top_k", "top_p", "temperature", "cond_scale", "image")
SAMPLING = ("top_k", "top_p", "temperature", "cond_scale")


@dataclass
class Prompts(Settings):
    title: ClassVar[str] = "what to draw"
    prompts: str = option(help="list of prompts: .txt (one a line), .csv, .jsonl, .parquet, or .tar (WebDataset shards "
                               "of captions); a path, several ('part-*.csv', 'data-{000..099}.tar'), a folder, or an "
                               "fsspec address (s3://, gs://, hf://)", metavar="LIST")  # fmt: skip
    columns: list = option([], "columns of the list that have other names: prompt=TITLE key=ID. Known are "
                               + ", ".join(COLUMNS), kind=name_value, nargs="+", metavar="NAME=COLUMN")  # fmt: skip
    images_dir: str | None = option(None, "the folder, or address, of the files in the column image (default: that of "
                                          "the list)")  # fmt: skip
    truncate_text: bool = option(False, "cut prompts off that are longer than the model reads; otherwise they are set "
                                        "aside")  # fmt: skip


@dataclass
class Sampling(Settings):
    title: ClassVar[str] = "sampling (without these, the model's own settings); columns of the list go first"
    num_images: int = option(16, "candidates per prompt", low=1)
    batch_size: int = option(32, "candidates sampled at once, of one prompt or of several", low=1)
    top_k: float | None = option(None, "below 1: the fraction of tokens cut away; a whole number: the tokens kept. "
                                       "Wins over --top_p", low=0)  # fmt: skip
    top_p: float | None = option(None, "sample from the most likely tokens of this share", low=0, high=1, above=True)
    temperature: float | None = option(None, "0 takes the most likely token", low=0)
    cond_scale: float | None = option(None, "guidance by the prompt; 1 is none", low=0)
    seed: int = option(0, "candidate i is the same under a seed, however many are sampled", low=0, high=2**64 - 1)
    num_init_img_tokens: int | None = option(None, "tokens kept of the images in the column image (default: 7 rows of "
                                                   "16)", low=0)  # fmt: skip


@dataclass
class Ranking(Settings):
    title: ClassVar[str] = "ranking"
    clip_sort: bool = option(True, "rank with CLIP, best first; with False the first --keep candidates are drawn")
    keep: int | None = option(None, "keep the best K candidates of a prompt (default: all)", low=1, metavar="K")
    prune: bool = option(False, "draw only half of a prompt's candidates in a batch on after a quarter of the tokens, "
                                "and a quarter after half of them: those that CLIP likes so far")  # fmt: skip


@dataclass
class Diffusion(Settings):
    title: ClassVar[str] = "diffusion, as in upscale"
    diffuse: int = option(0, "redraw the best K of a prompt by the diffusion decoder", low=0, metavar="K")
    diffuse_batch_size: int = option(8, "images diffused at once", low=1)
    steps: str | None = option(None, "diffusion steps (default: the default model's own, or quad25 with another)")
    sampler: str | None = option(None, "one of " + ", ".join(SAMPLERS) + " (default: the default model's own, or ddim "
                                       "with another)", choices=SAMPLERS)  # fmt: skip
    output_size: int | None = option(None, "side of the redrawn images in pixels (default: the model's)", low=16,
                                     high=8192)  # fmt: skip
    clip_guidance: bool = option(False, "guide the images towards their prompts")
    clip_guidance_scale: float | None = option(None, "(default: the default model's own, or 1000 with another)", low=0)


@dataclass
class Output(Settings):
    title: ClassVar[str] = "output"
    outputs_dir: Path = option(help="folder of the job; the same command again goes on with what is missing")
    output_format: str = option("shards", "WebDataset shards, or folders as generate writes them",
                                choices=("shards", "folders"))  # fmt: skip
    image_format: str = option("png", "png, or webp without loss", choices=("png", "webp"))
    unit_prompts: int | None = option(None, "prompts of a unit, which is one shard (default: by the number of prompts "
                                            "and images)", low=1, high=100_000, metavar="N")  # fmt: skip


@dataclass
class Running(Settings):
    title: ClassVar[str] = "running"
    num_workers: int | None = option(None, "processes that draw (default: one a GPU, or one a core that memory is "
                                           "there for)", low=1, high=1024)  # fmt: skip
    threads: int = option(1, "threads of each on a CPU. Part of the job: it may change the rounding", low=1, high=1024)
    device: str | None = option(None, "cpu, cuda (all GPUs), cuda:1 … (default: GPUs if there are any)")
    report_to: str | None = option(None, "tracker", choices=("none", "tensorboard"))
    retry_failed: bool = option(False, "draw the units again that have prompts which failed")


@dataclass
class Models(Settings):
    title: ClassVar[str] = "models (without these, the default model)"
    dalle_path: str | None = option(None, "a native folder, a dalle.pt, or min-dalle, min-dalle-mega or mindall-e")
    prior_flags: list = option([], "what the files of --dalle_path do not tell", kind=name_value, nargs="+",
                               metavar="NAME=VALUE")  # fmt: skip
    dtype: str = option("auto", DTYPE_HELP + ". Part of the job", choices=DTYPES)
    low_memory: bool = option(False, "release the prior's text encoder after each batch of prompts")
    vqgan_model_path: str | None = option(None, "a VQGAN in place of the one that the prior names")
    vqgan_config_path: str | None = option(None, "its model.yaml")
    taming: bool = option(False, "the published VQGAN in place of the one that the prior names")
    bpe_path: str | None = option(None, "tokenizer: a .model of YouTokenToMe, or with --hug a tokenizer.json")
    hug: bool = option(False, "--bpe_path is a tokenizer.json")
    chinese: bool = option(False, "the BERT Chinese tokenizer")
    clip_path: str | None = option(None, "the CLIP that ranks and guides")
    clip_config: str | None = option(None, "open_clip's architecture of --clip_path where its files do not tell it",
                                     metavar="NAME|FILE")  # fmt: skip
    decoder_path: str | None = option(None, "the diffusion decoder: a native folder, or a .pt of guided-diffusion's")
    model_size: int | None = option(None, "which published settings such a .pt has", choices=(64, 128, 256, 512))
    unet_flags: list = option([], "guided-diffusion's flags for it", kind=name_value, nargs="+", metavar="NAME=VALUE")
    class_label: int | None = option(None, "the ImageNet class that it is conditioned on, if it is one of those",
                                     low=0, high=999, metavar="N")  # fmt: skip
    super_res_path: str | None = option(None, "a super-resolution U-Net that draws the images at --output_size")
    super_res_flags: list = option([], "its flags, likewise", kind=name_value, nargs="+", metavar="NAME=VALUE")
    super_res_class: int | None = option(None, "its ImageNet class, likewise", low=0, high=999, metavar="N")


@dataclass
class BatchSettings(Models, RayCluster, Running, Output, Diffusion, Ranking, Sampling, Prompts):
    """A list of prompts to ranked candidates, tokens and diffused images. Interrupted or killed, the same command goes
    on with what is missing. Exit code 3 says that rows or prompts were set aside.

    dalle batch --prompts prompts.csv --num_images 64 --keep 8 --diffuse 2 --outputs_dir job
    dalle batch status job
    dalle batch report job
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vqgan_config_path and not self.vqgan_model_path:
            raise UsageError("--vqgan_config_path goes with --vqgan_model_path")
        if self.clip_config and not self.clip_path:
            raise UsageError("--clip_config goes with --clip_path")
        if (self.super_res_flags or self.super_res_class is not None) and not self.super_res_path:
            raise UsageError("--super_res_flags and --super_res_class go with --super_res_path")
        if self.prune and not (self.clip_sort and self.keep):
            raise UsageError("--prune goes with --keep and with ranking by CLIP: only what is not kept may be dropped")
        if self.keep is not None and self.diffuse > self.keep:
            raise UsageError(f"--diffuse {self.diffuse} is more than --keep {self.keep}: only what is kept is redrawn")
        if self.image_format != "png" and self.output_format == "folders":
            raise UsageError(f"--image_format {self.image_format} goes with --output_format shards")
        if unknown := [name for name, _ in self.columns if name not in COLUMNS]:
            raise UsageError(f"--columns: expected one of {', '.join(COLUMNS)} before the =, got {unknown[0]}")

    @property
    def needs_clip(self) -> bool:
        return self.clip_sort or (self.diffuse > 0 and self.clip_guidance)

    def parts(self) -> dict[str, Any]:
        """The models, as `Model.from_pretrained` takes them."""
        return {
            "prior": self.dalle_path, "low_memory": self.low_memory, "prior_flags": dict(self.prior_flags),
            "vae": self.vqgan_model_path, "vqgan_config_path": self.vqgan_config_path, "taming": self.taming,
            "tokenizer": self.bpe_path, "hug": self.hug, "chinese": self.chinese, "scorer": self.clip_path,
            "clip_config": self.clip_config, "decoder": self.decoder_path, "model_size": self.model_size,
            "unet_flags": dict(self.unet_flags), "class_label": self.class_label,
            "super_resolution": self.super_res_path, "super_res_flags": dict(self.super_res_flags),
            "super_res_class": self.super_res_class, "dtype": self.dtype,
        }  # fmt: skip

    def part_names(self) -> list[str]:
        """The parts of the model that the job uses."""
        return ["prior", "tokenizer", *(["scorer"] if self.needs_clip else []),
                *(["decoder"] if self.diffuse else []),
                *(["super_resolution"] if self.diffuse and self.super_res_path else [])]  # fmt: skip

    def recorded(self) -> dict[str, Any]:
        """What decides the outputs, models aside, ready for JSON: another value on resuming is refused."""
        kept = {name: value for part in (Prompts, Sampling, Ranking, Diffusion, Output)
                for name, value in self.values(part).items()}  # fmt: skip
        for name in ("prompts", "images_dir", "outputs_dir"):
            del kept[name]
        return {**kept, "columns": dict(self.columns), "threads": self.threads, "dtype": self.dtype}
