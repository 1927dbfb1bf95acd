"""The command `optimize`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dalle_pytorch.errors import UsageError, shorten
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.training.interruption import SignalWatch
from text_to_image.settings import INIT_NOISES, OptimizationSettings

if TYPE_CHECKING:
    from text_to_image.latents import Optimization

STATE_NAME, PREVIEWS_NAME = "state.safetensors", "previews"


@dataclass
class _Prompts(Settings):
    title: ClassVar[str] = "what to draw"
    prompts: str = option("", "texts, separated by |, each with a weight if wanted, text:weight, which may be "
                              "negative; ^ separates the parts of a story")  # fmt: skip
    image_prompts: str = option("", "images as prompts, likewise")
    add_text: str = option("", "more texts, for all parts of a story")
    remove_text: str = option("", "texts to lead away from, each by half unless a weight is given")


@dataclass
class _Start(Settings):
    title: ClassVar[str] = "what to begin with"
    init_image: Path | None = option(None, "an image", metavar="FILE")
    init_noise: str = option("gradient", "without one: a colour gradient, random pixels, or random codes",
                             choices=INIT_NOISES)  # fmt: skip
    size: list[int] = option([], "width and height in pixels, rounded down to whole tokens, or one number for both "
                                 "(default: the generator's)", low=1, nargs="+", metavar="N")  # fmt: skip


@dataclass
class _Output(Settings):
    title: ClassVar[str] = "output"
    outputs_dir: Path = option(Path("outputs/optimize"), "a folder for the prompts is made here")
    save_every: int | None = option(None, "write a preview, and the state for --resume, every N iterations (default: "
                                          "50, or 5 with --video)", low=1, metavar="N")  # fmt: skip
    resume: bool = option(False, "go on with the run of the same prompts and settings that was interrupted")
    video: str | None = option(None, "a video of the previews: mp4, which needs imageio-ffmpeg, webp or gif",
                               choices=("mp4", "webp", "gif"))  # fmt: skip
    plot: bool = option(False, "plot the loss, loss.png; needs matplotlib")


@dataclass
class _Models(Settings):
    title: ClassVar[str] = "models (without these, the default model)"
    generator: str | None = option(None, "a published image tokenizer: taming's vqgan, OpenAI's dvae",
                                   choices=("vqgan", "dvae"))  # fmt: skip
    vae_path: str | None = option(None, "or one's own: a native folder, a VQGAN's .ckpt, a vae.pt, a folder of "
                                        "encoder.pkl and decoder.pkl", flags=("--vqgan_checkpoint",))  # fmt: skip
    vqgan_config_path: str | None = option(None, "the model.yaml of a .ckpt", flags=("--vqgan_config",))
    clip_path: list[str] = option([], "one or several CLIPs: native folders, OpenAI's or open_clip's files, hub names",
                                  nargs="+", metavar="PATH")  # fmt: skip
    clip_config: str | None = option(None, "open_clip's architecture of a single --clip_path where its files do not "
                                           "tell it, such as ViT-H-14, or its JSON file",
                                     metavar="NAME|FILE")  # fmt: skip
    device: str | None = option(None, "cpu, cuda, cuda:1 … (default: a GPU if there is one)")


@dataclass
class OptimizeSettings(_Models, _Output, OptimizationSettings, _Start, _Prompts):
    """An image by CLIP alone: its gradient moves the latents of a VQGAN or dVAE. The tokens are for upscale.py.

    dalle optimize --prompts 'a red seven on brick'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.prompts or self.image_prompts or self.add_text):
            raise UsageError("expected --prompts or --image_prompts")
        if len(self.size) > 2:
            raise UsageError(f"expected --size as width and height, got {len(self.size)} numbers")
        if self.vqgan_config_path and not self.vae_path:
            raise UsageError("--vqgan_config_path goes with --vae_path")
        if self.clip_config and len(self.clip_path) != 1:
            raise UsageError("--clip_config goes with one --clip_path")


def main(argv: Sequence[str] | None = None) -> None:
    settings = OptimizeSettings.parse(argv)

    from diffusion.guidance import parse_prompts
    from text_to_image.pipeline import TextToImage
    from text_to_image.records import check_extras
    from text_to_image.results import claim_folder, make_writable

    check_extras(settings.video, settings.plot)
    clips = settings.clip_path
    pipe = TextToImage.from_pretrained(
        device=settings.device, generator=settings.vae_path or settings.generator,
        vqgan_config_path=settings.vqgan_config_path, scorer=clips[0] if len(clips) == 1 else None,
        clip_config=settings.clip_config,
    )  # fmt: skip
    run = pipe.optimization(
        settings.prompts, image_prompts=parse_prompts(settings.image_prompts), add=settings.add_text,
        remove=settings.remove_text, clips=clips if len(clips) > 1 else (),
        size=(settings.size[0], settings.size[-1]) if settings.size else None, init_image=settings.init_image,
        init_noise=settings.init_noise, **settings.values(OptimizationSettings),
    )  # fmt: skip
    for lost in run.lost_texts():
        print(f"warning: a CLIP does not read all of a prompt; left out: {shorten(lost, 200)}", file=sys.stderr)
    folder = claim_folder(make_writable(settings.outputs_dir), run.caption)
    if settings.resume:
        run.load(folder / STATE_NAME)
    started = time.monotonic()
    with SignalWatch() as watch:
        optimize(run, settings, folder, watch)
        result = run.result()
        if stale := result.write(folder, made_with=run.made_with if run.done else None):
            print(f"{folder}: moved to stale/, as they belong to other tokens: {shorten(', '.join(stale), 200)}")
    score = "" if result[-1].score is None else f", score {result[-1].score:.4f}"
    print(f"{folder}: {run.iteration} iterations in {time.monotonic() - started:.1f} s{score}")
    if watch.received and not run.done:
        print(f"stopped after iteration {run.iteration}; the same command with --resume goes on", file=sys.stderr)
        sys.exit(128 + watch.received)


def optimize(run: Optimization, settings: OptimizeSettings, folder: Path, watch: SignalWatch) -> None:
    """Runs with previews; at the end, or after a signal, writes the state, the video and the plot."""
    from dalle_pytorch.files.images import save_image
    from text_to_image.progress import ProgressBar
    from text_to_image.records import plot_loss, write_video

    every, previews = settings.save_every or (5 if settings.video else 50), folder / PREVIEWS_NAME
    for path in previews.glob("*.png"):  # of another run, or written after the state that is resumed
        if not settings.resume or path.stem > f"{run.iteration:06}":
            path.unlink()

    def each(run: Optimization) -> None:
        bar(run.iteration, run.iterations)
        if run.iteration % every == 0 or run.done:
            save_image(previews / f"{run.iteration:06}.png", run.preview())
            run.save(folder / STATE_NAME)

    with ProgressBar(run.caption[:40], "iteration") as bar:
        run.run(each, stop=lambda: watch.received)
    run.save(folder / STATE_NAME)
    if settings.video:
        write_video(folder / f"progress.{settings.video}", sorted(previews.glob("*.png")), settings.video)
    if settings.plot and run.state.history:
        plot_loss(folder / "loss.png", run.state.history)
