"""The work behind the page: requests run on the devices, and tell how far they are."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.schedule import spaced_steps
from text_to_image.model import Model
from text_to_image.pipeline import ImageInput, TextToImage
from text_to_image.results import Result
from text_to_image.web.forms import Diffusion, Generation, Saved

PREVIEW_STEPS = 3  # of the diffusion, between previews
INTERVAL = 0.2  # least seconds between two updates

T = TypeVar("T")


class Cancelled(Exception):
    """Raised in a request's thread when its visitor does not wait for it any more."""


async def stream(work: Callable[[Callable[[T], None]], object]) -> AsyncGenerator[T]:
    """Runs `work(update)` in a thread and yields what it calls `update` with, at last the last value.

    Values that come faster than every `INTERVAL`, or than they are asked for, are skipped. What `work` raises is raised
    here, after its last value. When this is closed or cancelled, the next call of `update` raises `Cancelled`.
    """
    loop, changed, latest, error = asyncio.get_running_loop(), asyncio.Event(), list[T](), list[BaseException]()
    closed, ended = threading.Event(), threading.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the page ends
            loop.call_soon_threadsafe(changed.set)

    def update(value: T) -> None:
        if closed.is_set():
            raise Cancelled
        latest[:] = [value]
        tell()

    def run() -> None:
        try:
            work(update)
        except BaseException as raised:  # raised again below, if anyone still waits
            error.append(raised)
        ended.set()
        tell()

    threading.Thread(target=run, daemon=True).start()
    try:
        await changed.wait()
        while not ended.is_set():
            changed.clear()
            yield latest[0]
            await asyncio.sleep(INTERVAL)
            await changed.wait()
        if latest:
            yield latest[0]
        if error:
            raise error[0]
    finally:
        closed.set()


class Workers:
    """Pipelines, one a device, each of which serves one request at a time.

    All their networks are opened at once, without the decoder unless there is `diffusion`. `models` has their hashes.
    """

    def __init__(self, pipes: Sequence[TextToImage], diffusion: bool = True):
        self.pipes, self.diffusion = pipes, diffusion
        parts = ("prior", "tokenizer", "scorer", *(["decoder"] if diffusion else []))
        for pipe in pipes:
            pipe.model.open(*parts)
        self.models = pipes[0].model.provenance(*parts)
        self._free: SimpleQueue[TextToImage] = SimpleQueue()
        for pipe in pipes:
            self._free.put(pipe)

    @contextlib.contextmanager
    def one(self) -> Iterator[TextToImage]:
        """Waits for a pipeline that is free: the last request on it may still be within its last step."""
        pipe = self._free.get()
        try:
            yield pipe
        finally:
            self._free.put(pipe)


@dataclass(frozen=True)
class Drawn:
    """The candidates of a request so far, best first, or the images that were diffused of them.

    Attributes:
        done, total: steps of the work, and all of them.
        saved: the request, for the file of settings.
        result: None before the first candidate.
    """

    saved: Saved
    done: int = 0
    total: int = 1
    result: Result | None = None

    @property
    def finished(self) -> bool:
        return self.result is not None and self.done == self.total


def generate(
    workers: Workers, form: Generation, start: ImageInput | Sequence[int] | None, batch_size: int
) -> AsyncGenerator[Drawn]:
    """Yields the candidates of a request as their batches are finished, and in between how far the work is.

    `start` is a picture of which the first `form.rows` rows of tokens are kept, or those tokens.
    """

    def work(update: Callable[[Drawn], None]) -> None:
        with workers.one() as pipe:
            tokens = _init_tokens(pipe, start, form.rows)
            drawn = Drawn(Saved(form, Diffusion(), None if tokens is None else tokens.tolist(), workers.models))

            def progress(done: int, total: int) -> None:
                nonlocal drawn
                # The last token of a batch is followed by its images.
                drawn = replace(drawn, done=min(done, total - 1), total=total)
                update(drawn)

            for result in pipe.generate_batches(
                form.prompt, form.num_images, batch_size=batch_size, seed=form.seed, init_image=tokens,
                temperature=form.temperature, top_p=form.top_p, cond_scale=form.cond_scale, progress=progress,
            ):  # fmt: skip
                drawn = replace(drawn, result=result)
                update(drawn)
            update(replace(drawn, done=drawn.total))

    return stream(work)


def load(workers: Workers, tokens: Sequence[Tensor], form: Generation) -> AsyncGenerator[Drawn]:
    """Yields the images of earlier tokens, numbered in that order, the best first by the prompt of the form."""

    def work(update: Callable[[Drawn], None]) -> None:
        with workers.one() as pipe:
            drawn = Drawn(Saved(form, Diffusion(), models=workers.models, loaded=True))
            update(drawn)
            update(replace(drawn, done=drawn.total, result=pipe.rank(list(tokens), form.prompt)))

    return stream(work)


def _init_tokens(pipe: TextToImage, start: ImageInput | Sequence[int] | None, rows: int) -> Tensor | None:
    if start is None:
        return None
    if isinstance(start, Sequence) and not isinstance(start, str):
        return torch.tensor(start)
    return pipe.encode_init_image(start, rows * pipe.model.prior.image_fmap_size).cpu()


def diffuse(workers: Workers, inputs: Result | Sequence[Tensor], saved: Saved) -> AsyncGenerator[Drawn]:
    """Yields previews of the images that the decoder redraws of candidates or their tokens, and at last the images.

    Those are `upscaled_pixels` of the results, of which there are none before the first preview. The seed, the prompt
    and the settings are those of `saved`.
    """
    form, prompt = saved.diffusion, saved.generation.prompt

    def work(update: Callable[[Drawn], None]) -> None:
        with workers.one() as pipe:
            picked = Result(pipe.read(inputs).images, prompt)
            images: list[Sequence[Tensor]] = [() for _ in picked]
            drawn = Drawn(saved, result=picked)

            def progress(done: int, total: int) -> None:
                nonlocal drawn
                drawn = replace(drawn, done=min(done, total - 1), total=total)
                update(drawn)

            def show(numbers: Sequence[int], pixels: Iterable[Tensor]) -> None:
                nonlocal drawn
                for number, image in zip(numbers, pixels, strict=True):
                    images[number] = (image,)
                drawn = replace(drawn, result=picked.with_upscaled(images))
                update(drawn)

            def preview(step: int, pixels: Tensor, items: Sequence[tuple[int, int]]) -> None:
                if step % PREVIEW_STEPS == 0:
                    show([i for i, _ in items], pixels)

            for image in pipe.upscale_each(
                picked, seed=saved.generation.seed, num_inference_steps=f"quad{form.steps}",
                clip_guidance=form.clip_guidance, output_size=form.size, callback=preview, progress=progress,
            ):  # fmt: skip
                show([image.input], [image.pixels])
            update(replace(drawn, done=drawn.total))

    return stream(work)


def own_steps(model: Model) -> int:
    """How many diffusion steps the model's own are."""
    return len(spaced_steps(model.decoder.denoiser.num_steps, model.num_inference_steps))


def pick(result: Result | None, picks: Sequence[int]) -> Result:
    """The candidates of these numbers, in that order; those that are not there are left out."""
    images = {image.index: image for image in result or ()}
    return Result([images[index] for index in picks if index in images], result.prompt if result else None)
