"""Results: images with their tokens and scores, in memory, in a notebook and on disk."""

from __future__ import annotations

import base64
import errno
import html
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, resize, save_image, tensor_to_image
from dalle_pytorch.files.lock import locked
from dalle_pytorch.files.text import decode_text, one_line
from dalle_pytorch.files.tokens import load_tokens, save_tokens
from text_to_image.inputs import CAPTION_NAME

SETTINGS_NAME = "settings.json"  # what the images of a folder were made with
STALE_NAME, NEW_NAME = "stale", ".new"  # folders in it
LARGEST_GRID = 64  # images on grid.png
LARGEST_COMPARISON = 16  # rows of before_after.png


@dataclass(frozen=True)
class ResultImage:
    """One image.

    Attributes:
        index: its number among the candidates of the prompt, or among the inputs of `upscale`.
        tokens: (side²,) int64, row by row; (rows, columns) of an image that is not square.
        pixels: (3, h, w) in [0, 1], as the image tokenizer decodes the tokens, or soft latents, see `optimize`.
        score: cosine similarity to the prompt, if it was ranked.
        input_pixels: the image that was given to `upscale`, if it was one, (3, h, w) in [0, 1] at the decoder's size.
        upscaled_pixels: what the diffusion decoder made of the tokens, each (3, H, W) in [0, 1].
    """

    index: int
    tokens: Tensor = field(repr=False)
    pixels: Tensor = field(repr=False)
    score: float | None = None
    input_pixels: Tensor | None = field(default=None, repr=False)
    upscaled_pixels: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def image(self) -> Image.Image:
        return tensor_to_image(self.pixels)

    @property
    def upscaled(self) -> Image.Image | None:
        """The (first) image of the diffusion decoder, None before `upscale`."""
        return tensor_to_image(self.upscaled_pixels[0]) if self.upscaled_pixels else None

    def _repr_html_(self) -> str:
        return _figure(self, "" if self.score is None else f"{self.score:.4f}")


class Result(Sequence[ResultImage]):
    """The images of a prompt, best first where they were ranked. A notebook shows them."""

    def __init__(self, images: Sequence[ResultImage], prompt: str | None = None):
        self.images, self.prompt = list(images), prompt

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> ResultImage: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> Result: ...
    def __getitem__(self, index: int | slice | Sequence[int]) -> ResultImage | Result:
        """An image by its rank, or the result of those in a slice or list of ranks."""
        if isinstance(index, Sequence):
            return Result([self.images[i] for i in index], self.prompt)
        return Result(self.images[index], self.prompt) if isinstance(index, slice) else self.images[index]

    def __repr__(self) -> str:
        scores = [image.score for image in self if image.score is not None]
        ranked = f", score {scores[0]:.4f}" if len(scores) == 1 else ""
        ranked = f", scores {max(scores):.4f} to {min(scores):.4f}" if len(scores) > 1 else ranked
        upscaled = ", upscaled" if any(image.upscaled_pixels for image in self) else ""
        return f"Result({self.prompt or 'no prompt'}, {len(self)} image{'s' * (len(self) != 1)}{ranked}{upscaled})"

    def with_upscaled(self, pixels: Sequence[Sequence[Tensor]]) -> Result:
        """The result with these images (3, H, W) of the diffusion decoder, some for each image."""
        images = [replace(image, upscaled_pixels=tuple(new)) for image, new in zip(self, pixels, strict=True)]
        return Result(images, self.prompt)

    def grid(self) -> Image.Image:
        """A contact sheet of the first images, or of what they were before and after `upscale`."""
        if not any(image.upscaled_pixels for image in self):
            return contact_sheet([image.pixels for image in self[:LARGEST_GRID]])
        rows = [[image.pixels, *image.upscaled_pixels] for image in self[:LARGEST_COMPARISON]]
        size = rows[0][-1].shape[-1]
        return contact_sheet([resize(cell[None], size)[0] for row in rows for cell in row], columns=len(rows[0]))

    def save(self, outputs_dir: str | os.PathLike = "outputs", tokens: bool = True) -> Path:
        """Writes the images into a folder of their own below `outputs_dir`, which is returned; see `write`."""
        folder = claim_folder(Path(outputs_dir), self.prompt or "images")
        self.write(folder, tokens)
        return folder

    def write(self, folder: Path, tokens: bool = True, made_with: Mapping[str, Any] | None = None) -> list[str]:
        """Writes `<rank>.png`, with the score in the name, `<rank>.npy` with `tokens`, and `grid.png`; of upscaled
        images `<rank>-upscaled.png` and `before_after.png`; last `settings.json` with `made_with`, see `is_finished`.

        All is written before the images of an earlier result are removed, so that there is never a mixture of both.
        Its tokens and upscaled images stay where the tokens of that rank are the same, and otherwise go to `stale/`:
        their names are returned. Raises `UsageError` if another process writes there for a minute.
        """
        with locked(folder, "images being written", wait=60):
            new = folder / NEW_NAME
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            try:
                self._write_files(new, tokens)
                (folder / SETTINGS_NAME).unlink(missing_ok=True)
                names = sorted(path.name for path in new.iterdir())
                stale = self._set_aside(folder)
                for name in names:
                    (new / name).replace(folder / name)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            if made_with is not None:
                content = json.dumps({**made_with, "files": names}, indent=2, ensure_ascii=False)
                write_text(folder / SETTINGS_NAME, content + "\n")
        return stale

    def _write_files(self, folder: Path, tokens: bool) -> None:
        for rank, image in enumerate(self):
            score = "" if image.score is None else f"-{image.score:.4f}"
            save_image(folder / f"{rank}{score}.png", image.pixels)
            if tokens:
                save_tokens(folder / f"{rank}.npy", image.tokens)
            for number, pixels in enumerate(image.upscaled_pixels):
                save_image(folder / f"{upscaled_name(rank, number)}.png", pixels)
        save_image(folder / "grid.png", contact_sheet([image.pixels for image in self[:LARGEST_GRID]]))
        if any(image.upscaled_pixels for image in self):
            save_image(folder / "before_after.png", self.grid())

    def _set_aside(self, folder: Path) -> list[str]:
        """Removes the images of an earlier result, and moves what belongs to other tokens to `stale/`."""
        same = {str(rank) for rank, image in enumerate(self) if _holds(folder / f"{rank}.npy", image.tokens)}
        stale = []
        for name in sorted(path.name for path in folder.iterdir()):
            if re.fullmatch(r"\d+(--?\d\.\d+)?\.png|grid\.png", name):
                (folder / name).unlink()
            elif (found := re.fullmatch(r"(\d+)(\.npy|-upscaled.*\.png)", name)) and found[1] not in same:
                stale.append(name)
        if any(name.endswith(".png") for name in stale) and (folder / "before_after.png").exists():
            stale.append("before_after.png")
        for name in stale:
            (folder / STALE_NAME).mkdir(exist_ok=True)
            (folder / name).replace(folder / STALE_NAME / name)
        return stale

    def _repr_html_(self) -> str:
        """The first images, each with its rank and score."""
        figures = [
            _figure(image, f"{rank}" if image.score is None else f"{rank} · {image.score:.4f}")
            for rank, image in enumerate(self[:LARGEST_GRID])
        ]
        more = f"<p>and {len(self) - LARGEST_GRID} more</p>" if len(self) > LARGEST_GRID else ""
        title = f"<p>{html.escape(self.prompt)}</p>" if self.prompt else ""
        return f'{title}<div style="display: flex; flex-wrap: wrap; gap: 8px">{"".join(figures)}</div>{more}'


def _figure(image: ResultImage, caption: str) -> str:
    """The HTML of an image, before what it was upscaled to, at the same size."""
    width = max(pixels.shape[-1] for pixels in (image.pixels, *image.upscaled_pixels))
    shown = ""
    for pixels in (image.pixels, *image.upscaled_pixels):
        buffer = io.BytesIO()
        tensor_to_image(pixels).save(buffer, "WEBP", quality=95)  # a tenth of a PNG, as notebooks keep their outputs
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        shown += f'<img src="data:image/webp;base64,{data}" width="{width}" style="margin: 0 4px 0 0; display: inline">'
    return f'<figure style="margin: 0">{shown}<figcaption>{html.escape(caption)}</figcaption></figure>'


def is_finished(folder: Path, made_with: Mapping[str, Any], tokens: bool) -> bool:
    """Whether `folder` has all images, with their `tokens`, of a result that was made with exactly this."""
    try:
        found = json.loads((folder / SETTINGS_NAME).read_text("utf-8"))
        files = found.pop("files")
        has_tokens = any(name.endswith(".npy") for name in files)
        return found == made_with and has_tokens >= tokens and all((folder / name).is_file() for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _holds(path: Path, tokens: Tensor) -> bool:
    """Whether a file has these tokens."""
    try:
        return path.is_file() and torch.equal(load_tokens(path, 2**31), tokens.cpu().flatten())
    except FileError:
        return False


def upscaled_name(stem: str | int, number: int) -> str:
    """The name, without suffix, of one of the images that an input is upscaled to."""
    return f"{stem}-upscaled{f'-{number}' if number else ''}"


def safe_name(prompt: str, longest: int = 80) -> str:
    """A file name of the prompt's letters, digits and `-`, the rest `_`, at most `longest` bytes.

    Begins with a letter or digit, so that it is no option of a command and not hidden; never empty, and no name that
    Windows keeps for devices.
    """
    name = re.sub(r"[^\w-]+", "_", prompt[: 16 * longest]).strip("_-")
    # File systems count bytes, not characters.
    name = name.encode("utf-8")[:longest].decode("utf-8", "ignore").rstrip("_-") or "prompt"
    return f"{name}_" if re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]", name, re.IGNORECASE) else name


def find_folder(outputs_dir: Path, prompt: str) -> Path:
    """The folder of a prompt: the one that is already its own, or the name of one that no other prompt has."""
    name, prompt = safe_name(prompt), one_line(prompt)
    for suffix in ["", *(f"-{i}" for i in range(2, 10_000))]:
        folder = outputs_dir / f"{name}{suffix}"
        caption = folder / CAPTION_NAME
        if not folder.exists():
            return folder
        if caption.is_file() and one_line(decode_text(caption.read_bytes(), errors="replace")) == prompt:
            return folder
    raise UsageError(f"{outputs_dir} has too many folders named {name}")


def claim_folder(outputs_dir: Path, prompt: str) -> Path:
    """`find_folder`, made and marked as the prompt's own."""
    with locked(outputs_dir, "folders being made", wait=60):
        folder = find_folder(outputs_dir, prompt)
        if not folder.exists():
            write_text(folder / CAPTION_NAME, one_line(prompt) + "\n")
    return folder


def make_writable(folder: Path) -> Path:
    """Makes the folder, or fails before the first image has cost its time."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder
