"""What a run of `optimize` leaves beside its images: a video of its previews, and a plot of its loss."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
from PIL import Image

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import atomic_write

VIDEOS = ("mp4", "webp", "gif")
FPS = 12
LAST_SECONDS = 2  # for which the last image stays


def check_extras(video: str | None, plot: bool) -> None:
    """Raises `UsageError`, which says what to install, if a package is missing for a video or a plot."""
    install = "is missing: pip install 'dalle-diffusion[optimize]'"
    if video == "mp4" and find_spec("imageio_ffmpeg") is None:
        raise UsageError(f"imageio-ffmpeg {install}, or make a webp or gif")
    if plot and find_spec("matplotlib") is None:
        raise UsageError(f"matplotlib {install}")


def write_video(path: str | os.PathLike, frames: Sequence[str | os.PathLike], kind: str) -> None:
    """Writes the images in files, all of one size, as a video: mp4 with imageio-ffmpeg, webp and gif with Pillow."""

    def read() -> Iterator[Image.Image]:
        for frame in [*frames, *[frames[-1]] * (LAST_SECONDS * FPS if kind == "mp4" else 0)]:
            with Image.open(frame) as image:
                yield image.convert("RGB")

    with atomic_write(path) as temporary:
        if kind != "mp4":
            first, *rest = read()
            durations = [1000 // FPS] * len(rest) + [1000 * LAST_SECONDS]
            first.save(temporary, kind.upper(), save_all=True, append_images=rest, duration=durations, loop=0)
            return
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

        size = next(read()).size
        writer = imageio_ffmpeg.write_frames(str(temporary), size, fps=FPS, quality=8, macro_block_size=2,
                                             output_params=["-f", "mp4"])  # fmt: skip
        writer.send(None)
        for image in read():
            writer.send(np.ascontiguousarray(image))
        writer.close()


def plot_loss(path: str | os.PathLike, history: Sequence[tuple[int, float, float]]) -> None:
    """Writes a PNG of the losses and scores of a run, `(iteration, loss, score or NaN)`, by iteration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss")
    axes.plot([i for i, _, _ in history], [loss for _, loss, _ in history], linewidth=0.8, label="loss")
    scored = [(i, score) for i, _, score in history if score == score]
    right = axes.twinx()
    right.plot([i for i, _ in scored], [score for _, score in scored], "C1", label="score")
    right.set_ylabel("score")
    figure.legend(loc="outside upper center", ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
