"""The pipeline: from a prompt to ranked images, and on to the diffusion decoder's. Everything runs through it.

pipe = TextToImage.from_pretrained()
result = pipe("a red seven on brick", num_images=64, keep=4, upscale=True, clip_guidance=True, seed=7)
result[0].upscaled, result[0].score
result.save("outputs")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.images import image_to_tensor, read_image, resize
from dalle_pytorch.files.tokens import load_tokens
from dalle_pytorch.sampling.candidates import ranked_candidates
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.vae.base import ImageTokenizer
from diffusion.guidance import ClipGuidance, parse_prompts
from diffusion.schedule import spaced_steps
from text_to_image.inputs import clean_prompt
from text_to_image.latents import Chapter, Optimization, start_tokens
from text_to_image.model import NUM_INFERENCE_STEPS, SAMPLER, Model, Source
from text_to_image.progress import Progress, as_progress
from text_to_image.results import Result, ResultImage
from text_to_image.settings import INIT_NOISES, OptimizationSettings

LARGEST_PROMPT = 2048  # longer side of an image as a prompt, in pixels: CLIP sees it smaller still

ImageInput = Image.Image | Source  # an image, or the path of one


class Upscaled(NamedTuple):
    """An image of the diffusion decoder."""

    input: int
    number: int  # among the images of that input
    pixels: Tensor  # (3, h, w) in [0, 1]


class TextToImage:
    """Generates, ranks and upscales images with the parts of a `Model`."""

    def __init__(self, model: Model):
        self.model = model

    @classmethod
    def from_pretrained(
        cls, name: Source | None = None, device: torch.device | str | None = None, **parts: Any
    ) -> TextToImage:
        """See `Model.from_pretrained`."""
        return cls(Model.from_pretrained(name, device, **parts))

    def __call__(
        self,
        prompt: str,
        num_images: int = 16,
        *,
        keep: int | None = None,
        upscale: bool = False,
        clip_guidance: bool = False,
        num_inference_steps: str | int | None = None,
        seed: int = 0,
        progress: Progress | bool | None = None,
        **options: Any,
    ) -> Result:
        """The best `keep` of `num_images` candidates, redrawn by the diffusion decoder with `upscale`.

        `clip_guidance` guides the decoder by the prompt; `options` are those of `generate`.
        """
        if clip_guidance and not upscale:
            raise UsageError("clip_guidance goes with upscale")
        result = self.generate(prompt, num_images, keep=keep, seed=seed, progress=progress, **options)
        if not upscale:
            return result
        return self.upscale(result, num_inference_steps=num_inference_steps, seed=seed, clip_guidance=clip_guidance,
                            progress=progress)  # fmt: skip

    # Stage 1

    def generate(self, prompt: str, num_images: int = 16, **options: Any) -> Result:
        """Samples candidates for a prompt: the last value of `generate_batches`, with its options."""
        *_, result = self.generate_batches(prompt, num_images, **options)
        return result

    def generate_batches(
        self,
        prompt: str,
        num_images: int = 16,
        *,
        keep: int | None = None,
        rank: bool = True,
        batch_size: int = 32,
        seed: int = 0,
        init_image: ImageInput | Tensor | None = None,
        num_init_image_tokens: int | None = None,
        progress: Progress | bool | None = None,
        **sampling: float | None,
    ) -> Iterator[Result]:
        """Yields, after each batch of candidates, the best of those so far. For the arguments that are not here see
        `ranked_candidates`.

        Args:
            rank: orders the candidates by CLIP's score; without it they are the first ones, in order.
            batch_size: candidates sampled at once, which does not change them.
            init_image: an image to complete, or the (k,) image tokens to begin with.
            num_init_image_tokens: how many of its tokens are kept, from the top; 7/16 of them unless given.
            progress: called with the tokens sampled, and with those of all candidates; or whether to show a bar, see
                `as_progress`. What it raises ends the sampling there.
            sampling: see `SamplingSettings`; the model's own unless given.

        Raises `UsageError` for an empty prompt and for what is out of range.
        """
        prompt, prior = clean_prompt(prompt), self.model.prior
        told = as_progress(progress, prompt[:40], "token")
        init_image_tokens = None if init_image is None else self.encode_init_image(init_image, num_init_image_tokens)
        sampled = prior.image_seq_len - (0 if init_image_tokens is None else len(init_image_tokens))
        count = num_images if rank else min(num_images, keep or num_images)

        def on_token(finished: int, tokens: int) -> None:
            if told is not None:
                told(finished * sampled + tokens * min(batch_size, count - finished), count * sampled)

        batches = ranked_candidates(
            prior, prompt, count, scorer=self.model.scorer if rank else None, keep=keep, batch_size=batch_size,
            seed=seed, init_image_tokens=init_image_tokens, settings=self.sampling(**sampling), progress=on_token,
        )  # fmt: skip
        return (Result([ResultImage(c.index, c.tokens, c.image, c.score) for c in best], prompt) for best in batches)

    def made_with(self, prompt: str, num_images: int, *, keep: int | None, rank: bool, seed: int,
                  init_image_tokens: Tensor | None = None, **sampling: float | None) -> dict[str, Any]:  # fmt: skip
        """What decides the images of `generate`, ready for JSON; models by a hash of their content."""
        first = None if init_image_tokens is None else init_image_tokens.tolist()
        return {
            "prompt": prompt, "seed": seed, "num_images": num_images, "keep": keep, "ranked": rank,
            "sampling": asdict(self.sampling(**sampling)), "init_image_tokens": first,
            "models": self.model.provenance("prior", "tokenizer", *(["scorer"] if rank else [])),
        }  # fmt: skip

    def complete_prompt(self, prompt: str, *, seed: int = 0, **sampling: float | None) -> str:
        """The prompt as the prior continues it; `sampling` as in `generate`."""
        prior, settings = self.model.prior, self.sampling(**sampling)
        _, (text,) = prior.generate_texts(
            self.model.tokenizer, clean_prompt(prompt), seed=seed, top_k=settings.top_k, top_p=settings.top_p,
            temperature=settings.temperature,
        )  # fmt: skip
        return clean_prompt(text)

    def sampling(self, **given: float | None) -> SamplingSettings:
        """The model's sampling settings with those given (not None) in their place; `top_p` replaces `top_k` too."""
        given = {name: value for name, value in given.items() if value is not None}
        if "top_p" in given:
            given = {"top_k": None, **given}
        return replace(self.model.sampling, **given)

    @torch.no_grad()
    def encode_init_image(self, image: ImageInput | Tensor, count: int | None = None) -> Tensor:
        """The first `count` image tokens of an image for the prior to complete; 7/16 of all unless given."""
        if isinstance(image, Tensor):
            return image
        prior = self.model.prior
        return encode_image(prior.vae, image, prior.image_fmap_size)[: prior.num_init_tokens(count)]

    # Stage 2

    def upscale(self, inputs: Any, num_images: int = 1, **options: Any) -> Result:
        """Redraws inputs, see `read`, by the diffusion decoder, with the options of `upscale_each`."""
        result = self.read(inputs)
        upscaled: list[list[Tensor]] = [[] for _ in result]
        for image in self.upscale_each(result, num_images, **options):
            upscaled[image.input].append(image.pixels)
        return result.with_upscaled(upscaled)

    def upscale_each(
        self,
        inputs: Any,
        num_images: int = 1,
        *,
        batch_size: int = 4,
        num_inference_steps: str | int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        stop_at: int | None = None,
        output_size: int | None = None,
        clip_guidance: bool | ClipGuidance = False,
        init_from: str | None = None,
        skip_steps: str | float | None = None,
        init_scale: float = 0.0,
        callback: Callable[[int, Tensor, Sequence[tuple[int, int]]], object] | None = None,
        progress: Progress | bool | None = None,
    ) -> Iterator[Upscaled]:
        """Yields the images of `upscale` as they are finished, in order.

        Args:
            batch_size: images diffused at once, of the same input or of several, which does not change them beyond
                rounding: noise is fixed by the seed, the tokens, and which of an input's images it is.
            num_inference_steps: diffusion steps, in any of the ways of `diffusion.schedule.spaced_steps`; the model's
                own unless given.
            sampler: one of `diffusion.samplers.SAMPLERS`; the model's own unless given.
            seed: of the noise, for all inputs or one for each.
            stop_at: ends after so many steps, with the image predicted by then.
            output_size: side of the images in pixels; the decoder's, or 4 times that with super-resolution.
            clip_guidance: whether CLIP guides by the prompt of the inputs; or how, see `guidance`.
            init_from: "tokens" begins with the image that the VAE decodes, "image" with the one that was given; None
                with the former where the U-Net does not know the tokens, and otherwise with noise alone.
            skip_steps, init_scale: with such an image, see `DiffusionDecoder.decode`.
            callback: called after each step with its number, from 1, the images (b, 3, h, w) predicted so far, and for
                each of them the number of its input and which of that input's images it is.
            progress: called with the steps done, and with those of all images; or whether to show a bar.

        Raises `UsageError` for what is out of range, before anything is drawn.
        """
        result, decoder, enlarger = self.read(inputs), self.model.decoder, self.model.super_resolution
        enlarger_steps, enlarger_sampler = num_inference_steps or NUM_INFERENCE_STEPS, sampler or SAMPLER
        num_inference_steps = num_inference_steps or self.model.num_inference_steps
        sampler = sampler or self.model.sampler
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        drawn = math.isqrt(len(result[0].tokens)) * decoder.unet.image_size // decoder.image_fmap_size
        size = output_size or (drawn if enlarger is None else 4 * drawn)
        if enlarger is not None and size <= drawn:
            raise UsageError(f"super-resolution enlarges: output_size must be above the decoder's {drawn} pixels")
        init_from = init_from or (None if decoder.knows_tokens else "tokens")
        if init_from not in (None, "tokens", "image"):
            raise UsageError(f"expected init_from tokens or image, got {init_from!r}")
        if init_from == "image" and (without := [i for i, image in enumerate(result) if image.input_pixels is None]):
            raise UsageError(f"init_from image needs images, and input {without[0]} is tokens: init_from tokens")
        if init_scale and not (init_from and clip_guidance):
            raise UsageError("init_scale needs an image to begin with, init_from, and guidance by CLIP")
        skip_steps = decoder.skip_steps(skip_steps, init_from is not None)
        steps = decoder.denoiser.respaced(num_inference_steps, skip_steps).num_steps
        if stop_at is not None and not 1 <= stop_at <= steps:
            raise UsageError(f"stop_at must be from 1 to {steps}, the number of steps, not {stop_at}")
        more = 0 if enlarger is None else len(spaced_steps(enlarger.denoiser.num_steps, enlarger_steps))
        if clip_guidance is True:
            if result.prompt is None:
                raise UsageError("guidance by CLIP needs a prompt, and these inputs have none; give pipe.guidance(…)")
            clip_guidance = self.guidance(result.prompt)
        items = [(i, number) for i in range(len(result)) for number in range(num_images)]
        seeds = [seed] * len(result) if isinstance(seed, int) else seed
        total, done, told = len(items) * ((stop_at or steps) + more), 0, as_progress(progress, "diffusing", "step")

        def step(batch: Sequence[tuple[int, int]], number: int = 0, images: Tensor | None = None) -> None:
            nonlocal done
            done += len(batch)
            if told is not None:
                told(done, total)
            if callback is not None and images is not None:
                callback(number, resize(images.cpu(), size), batch)

        def draw() -> Iterator[Upscaled]:
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                tokens = torch.stack([result[i].tokens for i, _ in batch]).to(decoder.device)
                inputs = [result[i] for i, _ in batch]
                given = [image.input_pixels if init_from == "image" else image.pixels for image in inputs]
                starts = [resize(pixels[None], drawn) for pixels in given if init_from and pixels is not None]
                images = decoder.decode(
                    tokens, num_inference_steps, sampler, [seeds[i] for i, _ in batch], [n for _, n in batch],
                    guidance=clip_guidance or None, stop_at=stop_at, skip_steps=skip_steps, init_scale=init_scale,
                    init_image=torch.cat(starts).to(decoder.device) if starts else None,
                    callback=lambda number, images, batch=batch: step(batch, number, images),
                )  # fmt: skip
                if enlarger is not None:
                    rows = zip(tokens.tolist(), batch, strict=True)
                    identities = [(seeds[i], tuple(row), n) for row, (i, n) in rows]
                    images = enlarger.enlarge(images, size, identities, enlarger_steps, enlarger_sampler,
                                              callback=lambda batch=batch: step(batch))  # fmt: skip
                for (i, number), pixels in zip(batch, resize(images.cpu(), size), strict=True):
                    yield Upscaled(i, number, pixels)

        return draw()

    def optimize(self, prompts: str | Sequence[tuple[str, float]] = "", *, progress: Progress | bool | None = None,
                 **options: Any) -> Result:  # fmt: skip
        """Images by CLIP alone, without prior and decoder: see `optimization`, which is run to its end.

        `progress` is called with the iterations done, and with all; or whether to show a bar.
        """
        run = self.optimization(prompts, **options)
        told = as_progress(progress, run.caption[:40], "iteration")
        return run.run(told and (lambda run: told(run.iteration, run.iterations)))

    def optimization(
        self,
        prompts: str | Sequence[tuple[str, float]] = "",
        *,
        image_prompts: Sequence[tuple[ImageInput, float]] = (),
        add: str = "",
        remove: str = "",
        clips: Sequence[CLIPModel | Source] = (),
        size: tuple[int, int] | None = None,
        init_image: ImageInput | None = None,
        init_noise: str = "gradient",
        **options: Any,
    ) -> Optimization:
        """A run in which CLIP's gradient moves the latents of the model's `generator`, see `text_to_image.latents`.

        Args:
            prompts: weighted texts, or "a seven:2|brick:-1"; "a ^ b" is a story of two images, each of which begins
                with the one before.
            image_prompts: images with weights.
            add, remove: more texts, likewise, for all of a story; those to remove weigh 0.5 unless given.
            clips: in place of the model's own, one or several at once.
            size: width and height in pixels, rounded down to whole tokens; the generator's own unless given.
            init_image: what to begin with, cut to the proportions of `size`.
            init_noise: what to begin with otherwise: a colour "gradient", random "pixels" or random "codes".
            options: see `OptimizationSettings`.

        Raises `UsageError` for what is out of range and does not fit the memory, before the first iteration.
        """
        settings = OptimizationSettings(**options)
        if init_noise not in INIT_NOISES:
            raise UsageError(f"expected init_noise as one of {', '.join(INIT_NOISES)}, got {init_noise!r}")
        if isinstance(prompts, str):
            story = [parse_prompts(part) for part in prompts.lower().split("^")]
        else:
            story = [list(prompts)]
        more = parse_prompts(add.lower()) + [(text, -weight) for text, weight in parse_prompts(remove.lower(), 0.5)]
        images = [(_prompt_image(image), weight) for image, weight in image_prompts]
        chapters = [Chapter([*texts, *more], images) for texts in story if texts] or [Chapter(more, images)]
        vae = self.model.generator
        first = None if init_image is None else read_image(init_image)
        start = start_tokens(vae, size or (vae.image_size, vae.image_size), first, init_noise, settings.seed)
        models = [self.model.clip(clip) for clip in clips] or [self.model.scorer]
        return Optimization(vae, models, chapters, start, settings)

    def guidance(
        self,
        prompts: str | Sequence[tuple[str, float]],
        image_prompts: Sequence[tuple[ImageInput, float]] = (),
        **options: Any,
    ) -> ClipGuidance:
        """Guidance of the decoder by CLIP towards a prompt, or towards weighted prompts and images; `options` are those
        of `ClipGuidance`, the model's own unless given (not None)."""
        options = self.model.guidance | {name: value for name, value in options.items() if value is not None}
        images = [(_prompt_image(image), weight) for image, weight in image_prompts]
        prompts = [(prompts, 1.0)] if isinstance(prompts, str) else prompts
        return ClipGuidance(self.model.scorer, prompts, images, **options)

    @torch.no_grad()
    def read(self, inputs: Any) -> Result:
        """Inputs of `upscale`: a `Result`, or one or a list of: its images, tokens (side²,), Pillow images, paths of
        images or of `.npy` files of tokens. Raises `UserError` for what does not fit the decoder."""
        decoder = self.model.decoder
        vae, side = decoder.vae, decoder.image_fmap_size
        several = isinstance(inputs, (Result, list, tuple)) or (isinstance(inputs, Tensor) and inputs.ndim == 2)
        values: list[Any] = list(inputs) if several else [inputs]
        images = []
        for index, value in enumerate(values):
            if isinstance(value, ResultImage):
                check_tokens(value.tokens, vae.num_tokens)
                images.append(value)
                continue
            given = None
            if isinstance(value, Tensor):
                tokens = check_tokens(value, vae.num_tokens)
            elif isinstance(value, Source) and Path(value).suffix.lower() == ".npy":
                tokens = load_tokens(value, vae.num_tokens, side**2)
            else:
                value = read_image(value)
                tokens = encode_image(vae, value, side).cpu()
                given = image_to_tensor(value, decoder.unet.image_size)[0]
            pixels = vae.decode_image(tokens[None].to(vae.device))[0].cpu()
            images.append(ResultImage(index, tokens, pixels, input_pixels=given))
        if len({len(image.tokens) for image in images}) != 1:
            raise UsageError("expected one or more inputs, all of the same number of tokens")
        return Result(images, inputs.prompt if isinstance(inputs, Result) else None)

    @torch.no_grad()
    def rank(self, inputs: Any, prompt: str) -> Result:
        """Inputs of `upscale`, see `read`, with CLIP's scores for a prompt, the best first."""
        prompt, images = clean_prompt(prompt), self.read(inputs).images
        scores = self.model.scorer.score(prompt, torch.stack([image.pixels for image in images])).tolist()
        ranked = [replace(image, score=score) for image, score in zip(images, scores, strict=True)]
        return Result(sorted(ranked, key=lambda image: image.score or 0.0, reverse=True), prompt)


def encode_image(vae: ImageTokenizer, image: ImageInput, side: int) -> Tensor:
    """The tokens (side²,) of the centre square of an image."""
    pixels = image_to_tensor(read_image(image), side * 2**vae.num_layers)
    return vae.get_codebook_indices(pixels.to(vae.device))[0]


def check_tokens(tokens: Tensor, num_tokens: int) -> Tensor:
    """The tokens, if they are a grid (side²,) of codes below `num_tokens`. Raises `UsageError` otherwise."""
    square = tokens.ndim == 1 and len(tokens) > 0 and math.isqrt(len(tokens)) ** 2 == len(tokens)
    if not square or tokens.min() < 0 or tokens.max() >= num_tokens:
        raise UsageError(f"expected a square grid of tokens, (side²,), from 0 to {num_tokens - 1}, got a tensor "
                         f"{tuple(tokens.shape)} of others")  # fmt: skip
    return tokens


def _prompt_image(image: ImageInput) -> Tensor:
    """An image as a prompt, (3, h, w) in [0, 1], of at most `LARGEST_PROMPT` pixels a side, in proportion."""
    reduced = read_image(image).copy()
    reduced.thumbnail((LARGEST_PROMPT, LARGEST_PROMPT))
    return image_to_tensor(reduced)[0]
