"""What the page answers: refusals beside fields, the status, images for galleries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.images import resize, tensor_to_image
from text_to_image.results import Result, ResultImage
from text_to_image.web import html
from text_to_image.web.work import Drawn

T = TypeVar("T")


def validation(refusals: dict[str, str], form: type[Any], values: Sequence[Any]) -> list[Any]:
    """gradio's answer for each of the values, of which the first are those of the form."""
    said = [refusals.get(field.name) for field in fields(form)]
    return [gr.validate(not text, text or "") for text in [*said, *[None] * (len(values) - len(said))]]


def file_validation(path: str | None, read: Callable[[str], object]) -> Any:
    """gradio's answer for an uploaded file, which is deleted if it is refused."""
    try:
        if path is not None:
            read(path)
    except FileError as error:
        Path(path or "").unlink(missing_ok=True)
        return gr.validate(False, str(error))
    return gr.validate(True, "")


def given(path: str, read: Callable[[str], T]) -> T:
    """What is read of an uploaded file, which is deleted: nothing of it is served."""
    if not Path(path).is_file():
        raise gr.Error("the file is not there any more; upload it again", print_exception=False)
    try:
        return read(path)
    except FileError as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        Path(path).unlink(missing_ok=True)


def progress(drawn: Drawn, one: str, many: str) -> str:
    """The status of a request."""
    count = len(drawn.result or ())
    if drawn.finished:
        return html.status(f"{count} {one if count == 1 else many}. Done.")
    return html.status(f"{drawn.done / drawn.total:.0%}", drawn.done, drawn.total)


def candidates(result: Result) -> list[tuple[Image.Image, str]]:
    """Images with their numbers and scores, for a gallery."""
    return [(image.image, f"#{image.index} · {image.score:.3f}") for image in result]


def pair(image: ResultImage) -> tuple[Image.Image, Image.Image]:
    """A candidate and what the diffusion made of it, of the same size."""
    after = image.upscaled_pixels[0]
    return tensor_to_image(resize(image.pixels[None], after.shape[-1])[0]), tensor_to_image(after)
