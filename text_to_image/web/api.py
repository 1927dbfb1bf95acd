"""What programs call, by gradio_client: the same requests as those of the page, without its state. docs/web.md has an
example.

gradio reads the types of the parameters, so that they are no strings here.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import torch
from gradio.events import api  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dalle_pytorch.errors import FileError, UserError
from dalle_pytorch.files.images import save_image
from text_to_image.results import ResultImage
from text_to_image.web.files import Folders, read_picture
from text_to_image.web.forms import Diffusion, Generation, Limits, Saved, are_tokens, check_prompt
from text_to_image.web.work import Drawn, Workers, diffuse, generate, own_steps


class Api:
    def __init__(self, workers: Workers, limits: Limits, folders: Folders, batch_size: int):
        self.workers, self.limits, self.folders, self.batch_size = workers, limits, folders, batch_size

    def connect(self, **device: Any) -> None:
        """Adds the functions to the page that is being built; `device` are gradio's settings of those that draw."""
        api(self.generate, **device)
        if self.workers.diffusion:
            api(self.diffuse, **device)
        api(self.unknown_words)

    async def generate(
        self, prompt: str, num_images: int = 8, temperature: float | None = None, top_p: float | None = None,
        cond_scale: float | None = None, seed: int = 0, picture: dict | None = None, rows: int = 7
    ) -> AsyncIterator[list[dict]]:  # fmt: skip
        """Draws candidates for a prompt: a list of {"index", "score", "tokens", "image"}, the best first, that grows
        with every batch. Temperature, top_p and cond_scale are the model's own unless given. The first `rows` rows of
        tokens are those of `picture`, an image file."""
        own = self.workers.pipes[0].sampling()
        form = Generation(prompt, num_images, own.temperature, own.top_p or 1.0, own.cond_scale, seed, rows)
        given = {"temperature": temperature, "top_p": top_p, "cond_scale": cond_scale}
        form = accepted(
            replace(form, **{name: value for name, value in given.items() if value is not None}), self.limits
        )
        shown, start = None, None if picture is None else self._picture(picture)
        async with running(generate(self.workers, form, start, self.batch_size)) as work:
            async for drawn in work:
                if drawn.result is not None and (drawn.result is not shown or drawn.finished):
                    shown = drawn.result
                    with self.folders.writing() as folder:
                        yield [_row(image) | {"image": await _file(folder, image.pixels)} for image in shown]

    async def diffuse(
        self, prompt: str, tokens: list[list[int]], clip_guidance: bool = False, steps: int | None = None,
        size: int | None = None, seed: int = 0
    ) -> AsyncIterator[list[dict]]:  # fmt: skip
        """Redraws images by diffusion: a list of {"image"}, one for each list of tokens; before they are finished,
        previews. With clip_guidance they are led towards the prompt. `steps` of diffusion and `size`, their side in
        pixels, are the model's own unless given."""
        model = self.workers.pipes[0].model
        number, length = model.prior.num_image_tokens, model.prior.image_seq_len
        rows = tokens if isinstance(tokens, list) else []
        if not rows or any(not are_tokens(row, number) or len(row) != length for row in rows):
            raise gr.Error(f"tokens: expected lists of {length} tokens below {number}", print_exception=False)
        steps = own_steps(model) if steps is None else steps
        form = accepted(Diffusion(list(range(len(rows))), clip_guidance, steps, size), self.limits)
        saved = Saved(accepted(Generation(prompt, seed=seed), self.limits), form)
        shown = None
        async with running(diffuse(self.workers, [torch.tensor(row) for row in rows], saved)) as work:
            async for drawn in work:
                images = [image.upscaled_pixels[0] for image in drawn.result or () if image.upscaled_pixels]
                if images and (drawn.result is not shown or drawn.finished):
                    shown = drawn.result
                    with self.folders.writing() as folder:
                        yield [{"image": await _file(folder, pixels)} for pixels in images]

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen."""
        try:
            return self.workers.pipes[0].model.unknown_words(check_prompt(prompt))
        except UserError:  # it is empty, or none
            return []

    def _picture(self, file: dict) -> Any:
        path = Path(str(file.get("path") if isinstance(file, dict) else ""))
        if not path.resolve().is_relative_to(self.folders.served.resolve()):
            raise gr.Error("picture: expected an uploaded file", print_exception=False)
        try:
            return read_picture(path)
        except FileError as error:
            raise gr.Error(str(error), print_exception=False) from error


async def _file(folder: Path, pixels: Tensor) -> dict[str, Any]:
    """A file for gradio to serve."""
    path = folder / f"{len(list(folder.iterdir()))}.png"
    await asyncio.to_thread(save_image, path, pixels)
    return gr.FileData(path=str(path)).model_dump()


def _row(image: ResultImage) -> dict[str, Any]:
    return {"index": image.index, "score": image.score, "tokens": image.tokens.tolist()}


def accepted(form: Any, limits: Limits) -> Any:
    """The form, unless it is refused. The page has a validator before, which says it beside the field."""
    for name, refusal in form.refusals(limits).items():
        raise gr.Error(f"{name}: {refusal}", print_exception=False)
    return form


@asynccontextmanager
async def running(work: AsyncGenerator[Drawn]) -> AsyncIterator[AsyncIterator[Drawn]]:
    """Ends the work with the block, and says what the visitor can correct."""
    try:
        async with aclosing(work):
            yield work
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
