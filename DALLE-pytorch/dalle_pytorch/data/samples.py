"""One sample from the bytes of a picture and of its captions: what folders and shards have in common."""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.data.loading import BrokenSample

CaptionProblem = Callable[[str], str | None]  # the reason to skip a caption, or None


@functools.cache
def picture_formats() -> dict[str, str]:
    """Pillow's formats by file suffix, `.png` to `PNG`. PostScript is left out: to read it, Pillow runs Ghostscript."""
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in ("EPS", "PDF")
    }


def read_picture(
    source: str | os.PathLike | bytes,
    name: object,
    resolution: int,
    crop_ratio: float = 1.0,
    generator: np.random.Generator | None = None,
    transparent: bool = False,
) -> Tensor:
    """A square of the picture in a file, or in its bytes: (3, resolution, resolution) uint8.

    With `transparent` a fourth channel is its opacity; else what is not opaque is laid over white. A picture that the
    camera held sideways is turned. The square is the picture's centre; with `crop_ratio` below 1 and a `generator`, a
    random one inside it, whose area is the share `crop_ratio` to 1 of it.

    Raises `BrokenSample`, which calls it `name`, for anything that cannot be read, and for pictures so large that
    Pillow takes them for an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=sorted(set(picture_formats().values()))) as image:
                # A JPEG is decoded at the eighth, quarter or half of its size that is still over twice what is needed.
                image.draft(None, (2 * resolution, 2 * resolution))
                ImageOps.exif_transpose(image, in_place=True)
                image = _cut(image, crop_ratio, generator)
                image = _as_colours(image, transparent)
                image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's readers has its own way to fail on bytes that mean nothing
        detail = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenSample("broken picture", name, detail) from None


def _cut(image: Image.Image, crop_ratio: float, generator: np.random.Generator | None) -> Image.Image:
    whole = min(image.size)
    left, top = (image.width - whole) // 2, (image.height - whole) // 2
    side = whole
    if crop_ratio < 1 and generator is not None:
        side = max(1, round(whole * math.sqrt(generator.uniform(crop_ratio, 1))))
        across, down = generator.integers(whole - side + 1, size=2).tolist()
        left, top = left + across, top + down
    return image.crop((left, top, left + side, top + side))


def _as_colours(image: Image.Image, transparent: bool) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits a pixel, which Pillow's own conversion would cut off at 255.
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    see_through = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if transparent:
        return image.convert("RGBA")
    if not see_through:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_captions(text: bytes, name: object) -> list[str]:
    """The captions in a text: one a line, blank ones left out. Raises `BrokenSample` if there is none."""
    encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        lines = text.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise BrokenSample("caption that is not UTF-8", name, error) from None
    return usable_captions(lines, name)


def usable_captions(captions: list[str], name: object) -> list[str]:
    """Captions without the blanks around them. Raises `BrokenSample` if all are empty."""
    captions = [" ".join(caption.split()) for caption in captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise BrokenSample("empty caption", name)
    return captions


def pick_caption(
    captions: list[str],
    name: object,
    generator: np.random.Generator | None = None,
    problem: CaptionProblem | None = None,
) -> str:
    """One of the captions at random, the first without a generator.

    Those that `problem` gives a reason to skip are left out; `BrokenSample` has that reason if none is left.
    """
    if problem is not None:
        reasons = [problem(caption) for caption in captions]
        usable = [caption for caption, reason in zip(captions, reasons, strict=True) if reason is None]
        if not usable:
            raise BrokenSample(reasons[0] or "", name, captions[0])
        captions = usable
    return captions[0 if generator is None else int(generator.integers(len(captions)))]
