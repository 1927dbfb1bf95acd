"""One sample from the bytes of an image and of its captions: what folders and shards have in common."""

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_pytorch.data.loading import BrokenSample
from dalle_pytorch.errors import FileError
from dalle_pytorch.files.images import decode_image
from dalle_pytorch.files.text import decode_text, one_line

CaptionProblem = Callable[[str], str | None]  # the reason to skip a caption, or None


def load_image(source: str | os.PathLike | bytes, name: object, resolution: int, crop_ratio: float = 1.0,
               generator: np.random.Generator | None = None, transparent: bool = False) -> Tensor:  # fmt: skip
    """A square of the image in a file, or in its bytes: (3, resolution, resolution) uint8, 4 channels if `transparent`.

    The square is the image's centre; with `crop_ratio` below 1 and a `generator` a random one inside it, with a share
    `crop_ratio` to 1 of its area. Raises `BrokenSample`, with `name` in the message.
    """
    try:
        image = decode_image(source, transparent=transparent, min_side=2 * resolution)
    except FileError as error:
        raise BrokenSample("broken image", name, error) from None
    image = _crop(image, crop_ratio, generator).resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _crop(image: Image.Image, crop_ratio: float, generator: np.random.Generator | None) -> Image.Image:
    whole = min(image.size)
    left, top = (image.width - whole) // 2, (image.height - whole) // 2
    side = whole
    if crop_ratio < 1 and generator is not None:
        side = max(1, round(whole * math.sqrt(generator.uniform(crop_ratio, 1))))
        across, down = generator.integers(whole - side + 1, size=2).tolist()
        left, top = left + across, top + down
    return image.crop((left, top, left + side, top + side))


def read_captions(text: bytes, name: object) -> list[str]:
    """The captions in a text, one a line, without blank ones. Raises `BrokenSample` if there is none."""
    try:
        lines = decode_text(text).splitlines()
    except FileError as error:
        raise BrokenSample("caption that is not UTF-8", name, error) from None
    return usable_captions(lines, name)


def usable_captions(captions: list[str], name: object) -> list[str]:
    """Captions with single spaces, without empty ones. Raises `BrokenSample` if all are empty."""
    captions = [line for caption in captions if (line := one_line(caption))]
    if not captions:
        raise BrokenSample("empty caption", name)
    return captions


def pick_caption(captions: list[str], name: object, generator: np.random.Generator | None = None,
                 problem: CaptionProblem | None = None) -> str:  # fmt: skip
    """A random caption, the first without a generator, out of those without a `problem`.

    Raises `BrokenSample` with the first problem as its reason if there is none.
    """
    if problem is not None:
        reasons = [problem(caption) for caption in captions]
        usable = [caption for caption, reason in zip(captions, reasons, strict=True) if reason is None]
        if not usable:
            raise BrokenSample(reasons[0] or "", name, captions[0])
        captions = usable
    return captions[0 if generator is None else int(generator.integers(len(captions)))]
