"""Images by CLIP alone: CLIP's gradient moves the latents of an image tokenizer until it likes the image; no prior.

The scheme of VQGAN+CLIP (Crowson et al. 2022, arXiv:2204.08583), for any image tokenizer:

    latents ─▶ codebook rows ─decoder─▶ image ─cutouts─▶ CLIP ─▶ spherical distance to the prompts ─gradient─▶ latents

The rows are those of the nearest codes, with a straight-through gradient ("codes"); the latents as they are ("soft");
or the codebook weighed by the softmax of the latents, which sharpens in the course of the run ("one_hot", as for
OpenAI's dVAE). The image is made of an average of the latents (EMA), and the best one by CLIP's score is kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError, SamplingDiverged, UsageError
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.images import image_to_tensor, resize
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE
from diffusion.guidance import encode_prompts, make_cutouts, spherical_distance
from diffusion.samplers import generator
from text_to_image.results import Result, ResultImage
from text_to_image.settings import OptimizationSettings

EVALUATE_EVERY = 10  # iterations between two scores of the image, of which the best is kept
LAST_TEMPERATURE = 0.1  # of one-hot latents, from 1
LARGEST_SIDE = 8192  # of an image, in pixels
WORKSPACE = 1.5  # memory that a step takes, in that of the tensors it keeps for its gradient


@dataclass(frozen=True)
class Chapter:
    """The prompts of an image, or of one part of a story, each with its weight; the image is led away from negative
    ones. Images are (3, h, w) in [0, 1]."""

    prompts: Sequence[tuple[str, float]]
    image_prompts: Sequence[tuple[Tensor, float]] = ()

    @property
    def caption(self) -> str:
        """The texts that the image is led to."""
        return ", ".join(text for text, weight in self.prompts if weight > 0)


# Latents


class Latents:
    """What is optimized: a tensor (1, c, rows, columns), and what it stands for.

    For codes and soft latents c is the width of a codebook row, each column in its standard deviations from its mean;
    for one-hot latents c is the number of codes, and the values are logits.
    """

    def __init__(self, vae: ImageTokenizer, kind: str):
        self.vae, self.kind = vae, kind
        self.codebook = vae.codebook_weight.detach().float()
        # (1, c, 1, 1)
        self.mean, self.std = (x[None, :, None, None] for x in (self.codebook.mean(0), self.codebook.std(0) + 1e-6))
        self.low, self.high = (
            (x[None, :, None, None] - self.mean) / self.std for x in (self.codebook.amin(0), self.codebook.amax(0))
        )

    def encode(self, tokens: Tensor) -> Tensor:
        """The latents of tokens (rows, columns)."""
        if self.kind == "one_hot":
            chosen = F.one_hot(tokens[None], len(self.codebook)).permute(0, 3, 1, 2).float()
            return math.log(len(self.codebook)) * chosen  # of the softmax, half is the token's
        return (self.codebook[tokens[None]].permute(0, 3, 1, 2) - self.mean) / self.std

    def rows(self, value: Tensor, temperature: float = 1.0) -> Tensor:
        """Codebook rows (1, codebook_dim, rows, columns), with a gradient."""
        if self.kind == "one_hot":
            return torch.einsum("bnhw,nd->bdhw", (value / temperature).softmax(1), self.codebook)
        rows = value * self.std + self.mean
        if self.kind == "soft":
            return rows
        return rows + (self.vae.embed(self.tokens(value)[None]) - rows).detach()

    @torch.no_grad()
    def tokens(self, value: Tensor) -> Tensor:
        """The nearest, or likeliest, codes (rows, columns)."""
        if self.kind == "one_hot":
            return value[0].argmax(0)
        # Minus squared distances, up to what all codes have in common.
        similarity = 2 * F.conv2d(value * self.std + self.mean, self.codebook[..., None, None])
        return (similarity - self.codebook.square().sum(1)[:, None, None])[0].argmax(0)

    @torch.no_grad()
    def image(self, value: Tensor) -> Tensor:
        """The image (3, h, w) in [0, 1]: that of the codes, or of soft latents their own."""
        rows = self.rows(value) if self.kind == "soft" else self.vae.embed(self.tokens(value)[None])
        return self.vae.decode_embeddings(rows)[0].clamp(0, 1)

    @torch.no_grad()
    def clamp_(self, value: Tensor) -> None:
        """Holds the latents within the range of the codebook."""
        if self.kind != "one_hot":
            value.clamp_(self.low, self.high)


def start_tokens(vae: ImageTokenizer, size: tuple[int, int], image: Image.Image | None = None, noise: str = "codes",
                 seed: int = 0) -> Tensor:  # fmt: skip
    """The tokens (rows, columns) to begin with, for an image of `size`, (width, height), rounded down to whole tokens.

    Those of `image`, cut to the proportions of `size`; or random "codes", or those of random "pixels", or of a random
    colour "gradient". Raises `UsageError` for a size that is out of range.
    """
    f = 2**vae.num_layers
    columns, rows = (side // f for side in size)
    if min(rows, columns) < 1 or max(size) > LARGEST_SIDE:
        raise UsageError(f"expected sides of {f} to {LARGEST_SIDE} pixels, got {size[0]}×{size[1]}")
    random = generator(seed, "start")
    if image is not None:
        pixels = image_to_tensor(ImageOps.fit(image, (columns * f, rows * f), Image.Resampling.LANCZOS))
    elif noise == "codes":
        return torch.randint(vae.num_tokens, (rows, columns), generator=random).to(vae.device)
    elif noise == "pixels":
        pixels = torch.rand(1, 3, rows * f, columns * f, generator=random)
    else:  # each corner has a colour
        corners = torch.rand(1, 3, 2, 2, generator=random)
        pixels = F.interpolate(corners, (rows * f, columns * f), mode="bilinear", align_corners=True)
    return vae.get_codebook_indices(pixels.to(vae.device)).view(rows, columns)


# Cutouts


def augment(cutouts: Tensor, names: Sequence[str], noise: float, random: torch.Generator) -> Tensor:
    """Changes each of the cutouts (n, 3, s, s) at random.

    "flip" mirrors half of them; "affine" turns by up to 15°, scales and shifts by up to a tenth; "colour" changes
    brightness, contrast and saturation; "erasing" paints a grey rectangle over half of them. `noise` is the largest
    standard deviation of Gaussian noise.
    """
    n, size = len(cutouts), cutouts.shape[-1]
    u = (2 * torch.rand(12, n, 1, 1, 1, generator=random) - 1).to(cutouts)  # in [-1, 1)
    if "flip" in names or "affine" in names:
        flip = torch.where(u[0, :, 0, 0, 0] < 0, -1.0, 1.0) if "flip" in names else torch.ones_like(u[0, :, 0, 0, 0])
        angle, scale, x, y = u[1:5, :, 0, 0, 0] * (torch.tensor([math.pi / 12, 0.1, 0.1, 0.1]).to(cutouts)[:, None]
                                                   if "affine" in names else 0)  # fmt: skip
        scale = 1 + scale
        theta = torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), x,
                             flip * scale * angle.sin(), scale * angle.cos(), y], dim=1)  # fmt: skip
        grid = F.affine_grid(theta.view(n, 2, 3), list(cutouts.shape), align_corners=False)
        cutouts = F.grid_sample(cutouts, grid, padding_mode="border", align_corners=False)
    if "colour" in names:
        mean, grey = cutouts.mean((1, 2, 3), keepdim=True), cutouts.mean(1, keepdim=True)
        cutouts = grey + (cutouts - grey) * (1 + 0.2 * u[5])
        cutouts = mean + (cutouts - mean) * (1 + 0.2 * u[6]) + 0.1 * u[7]
    if "erasing" in names:
        places = torch.linspace(-1, 1, size).to(cutouts)
        inside = ((places[:, None] - u[8]).abs() < 0.3) & ((places - u[9]).abs() < 0.3) & (u[10] < 0)
        cutouts = torch.where(inside, 0.5, cutouts)
    if noise:
        drawn = torch.randn(cutouts.shape, generator=random).to(cutouts)
        cutouts = cutouts + noise * u[11].abs() * drawn
    return cutouts


class Target:
    """What one CLIP is to see: its features of a chapter's prompts. Weights are divided by the sum of their sizes."""

    def __init__(self, clip: CLIPModel, chapter: Chapter):
        self.clip = clip
        self.features, weights = encode_prompts(clip, chapter.prompts, chapter.image_prompts)
        total = sum(map(abs, weights))
        if total < 1e-3:
            raise UsageError(f"the weights of the prompts are too small: the sum of their sizes is {total:g}")
        self.weights = torch.tensor(weights, device=self.features.device) / total

    def distance(self, image: Tensor, settings: OptimizationSettings, random: torch.Generator) -> Tensor:
        """The weighted distance to the prompts of random cutouts of an image (3, h, w), a scalar."""
        side = min(image.shape[-2:])
        padding = round(settings.cut_padding * side)
        sides = (max(1, round(settings.cut_size[0] * side)), max(1, round(settings.cut_size[-1] * side)))
        padded = F.pad(image[None], [padding] * 4, "replicate")[0]
        cutouts = make_cutouts(padded, self.clip.image_size, settings.cutn, settings.cut_pow, random, sides)
        cutouts = augment(cutouts, settings.augments, settings.cut_noise, random)
        features = self.clip.encode_image(cutouts).float()
        return (spherical_distance(features[:, None], self.features) @ self.weights).mean()

    @torch.no_grad()
    def score(self, image: Tensor) -> float:
        """The weighted cosine similarity of an image (3, h, w) to the prompts."""
        features = self.clip.encode_image(resize(image[None], self.clip.image_size)).float()
        return float(F.cosine_similarity(features, self.features) @ self.weights)


# Memory


class _Call(nn.Module):
    def __init__(self, module: nn.Module, method: Callable[[Tensor], Tensor]):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        return self.method(x)


def kept_bytes(module: nn.Module, method: Callable[[Tensor], Tensor], shape: Sequence[int]) -> int:
    """Bytes that `method` of `module` keeps for the gradient of an input of this shape. Nothing is computed: all
    tensors are on the meta device."""
    call = _Call(module, method)
    weights = {name: torch.empty_like(value, device="meta", requires_grad=False)
               for name, value in (*call.named_parameters(), *call.named_buffers())}  # fmt: skip
    kept: dict[int, Tensor] = {}  # by storage; held, so that none is reused

    def pack(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional_call(call, weights, (torch.empty(*shape, device="meta", requires_grad=True),))
    for value in weights.values():
        kept.pop(value.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can still be taken."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


# The run


@dataclass
class _State:
    """Where a run is. Tensors are latents (1, c, rows, columns)."""

    value: Tensor
    ema: Tensor
    best: Tensor
    chapter: int = 0
    iteration: int = 0
    best_score: float = -math.inf
    best_iteration: int = 0
    finished: list[Tensor] = field(default_factory=list)  # the best of each chapter that is done
    finished_scores: list[float] = field(default_factory=list)
    history: list[tuple[int, float, float]] = field(default_factory=list)  # iteration, loss, score or NaN


class Optimization:
    """A run, which can be interrupted, saved and resumed: every random number is fixed by seed, chapter and iteration.

    Args:
        vae: whose latents are moved.
        clips: the CLIPs whose distances to the prompts, on average, are to fall.
        chapters: one or more; each begins with the image of the one before.
        start: tokens (rows, columns) to begin with, see `start_tokens`.
        settings: see `OptimizationSettings`.

    Raises `UsageError` for prompts that are missing, and for sizes that do not fit the memory.
    """

    def __init__(self, vae: ImageTokenizer, clips: Sequence[CLIPModel], chapters: Sequence[Chapter], start: Tensor,
                 settings: OptimizationSettings):  # fmt: skip
        if vae.channels != 3:
            raise UsageError(f"expected an image tokenizer of 3 channels, got one of {vae.channels}")
        self.vae, self.clips, self.chapters, self.settings = vae, clips, chapters, settings
        self.start_tokens = start
        self.latents = Latents(vae, settings.latents or ("codes" if isinstance(vae, VQGanVAE) else "one_hot"))
        value = self.latents.encode(start).contiguous()  # as one that is read again
        self._check_memory(value)
        self.targets = [[Target(clip, chapter) for clip in clips] for chapter in chapters]
        self.start = self.latents.rows(value) if settings.init_weight else None
        self.state = _State(value, value, value)
        self._begin(value)

    def _check_memory(self, value: Tensor) -> None:
        height, width = (side * 2**self.vae.num_layers for side in value.shape[-2:])
        needed = kept_bytes(self.vae, self.vae.decode_embeddings, (1, self.vae.codebook_dim, *value.shape[-2:]))
        for clip in self.clips:
            cutouts = (self.settings.cutn, 3, clip.image_size, clip.image_size)
            needed += kept_bytes(clip, clip.encode_image, cutouts) + 4 * 4 * math.prod(cutouts)
        needed = WORKSPACE * (needed + 8 * value.nbytes + 4 * 4 * 3 * height * width) / 2**30
        free = free_bytes(self.vae.device) / 2**30
        if needed > free:
            raise UsageError(f"an image of {width}×{height} pixels and {self.settings.cutn} cutouts need about "
                             f"{needed:.1f} GiB of memory with these models, and {free:.1f} are free; a smaller size, "
                             "or fewer cutouts (cutn), need less")  # fmt: skip

    def _begin(self, value: Tensor) -> None:
        """Begins a chapter with these latents."""
        state = self.state
        state.value = nn.Parameter(value.detach().clone())
        state.ema, state.best = value.detach().clone(), value.detach().clone()
        state.iteration, state.best_iteration, state.best_score = 0, 0, -math.inf
        optimizer = vars(torch.optim)[self.settings.optimizer]
        self.optimizer: torch.optim.Optimizer = optimizer([state.value], lr=self.settings.learning_rate)

    @property
    def done(self) -> bool:
        return self.state.chapter == len(self.chapters)

    @property
    def iteration(self) -> int:
        """Iterations done, those of earlier chapters among them."""
        return self.state.history[-1][0] if self.state.history else 0

    @property
    def iterations(self) -> int:
        """All iterations, of all chapters, unless some end early."""
        return self.settings.iterations * len(self.chapters)

    def run(self, callback: Callable[[Optimization], object] | None = None,
            stop: Callable[[], object] | None = None) -> Result:  # fmt: skip
        """Goes on to the end, or until `stop` returns something true between two iterations.

        `callback` is called before the first iteration, and after each. Raises `SamplingDiverged` if the loss is not
        finite.
        """
        if callback is not None and not self.iteration:
            callback(self)
        while not self.done and not (stop is not None and stop()):
            self._step()
            if callback is not None:
                callback(self)
        return self.result()

    def _step(self) -> None:
        settings, state = self.settings, self.state
        done = state.iteration / settings.iterations
        rate = settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done) if settings.lr_decay else 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.latents.rows(state.value, LAST_TEMPERATURE**done)
        image = self.vae.decode_embeddings(rows)[0]
        image = image + (image.clamp(0, 1) - image).detach()  # what is clipped has a gradient too
        randoms = [generator(settings.seed, "cutouts", state.chapter, state.iteration) for _ in self.clips]
        pairs = zip(self.targets[state.chapter], randoms, strict=True)
        loss = torch.stack([target.distance(image, settings, random) for target, random in pairs]).mean()
        if self.start is not None:
            loss = loss + settings.init_weight * ((rows - self.start) / self.latents.std).square().mean()
        if not loss.isfinite():
            raise SamplingDiverged(f"the loss is not finite after {self.iteration} iterations; a smaller learning_rate "
                                   "may help")  # fmt: skip
        (state.value.grad,) = torch.autograd.grad(loss, [state.value])
        self.optimizer.step()
        self.latents.clamp_(state.value)
        # At first over all latents so far, so that the start does not linger.
        decay = min(settings.ema_decay, (1 + state.iteration) / (10 + state.iteration))
        state.ema.lerp_(state.value.detach(), 1 - decay if settings.ema_decay else 1.0)
        state.iteration += 1
        last = state.iteration == settings.iterations
        score = self._evaluate() if last or state.iteration % EVALUATE_EVERY == 0 else math.nan
        state.history.append((self.iteration + 1, float(loss.detach()), score))
        stalled = settings.patience and state.iteration - state.best_iteration >= settings.patience
        if last or (stalled and score == score):
            state.finished.append(state.best)
            state.finished_scores.append(state.best_score)
            state.chapter += 1
            if not self.done:
                self._begin(state.best)

    def _evaluate(self) -> float:
        """The score of the averaged latents, which are kept if it is the best."""
        state = self.state
        score = self.score(self.latents.image(state.ema))
        if score > state.best_score:
            state.best, state.best_score, state.best_iteration = state.ema.clone(), score, state.iteration
        return score

    def score(self, image: Tensor) -> float:
        """The weighted cosine similarity of an image (3, h, w) to the prompts of the chapter, the mean of the CLIPs."""
        targets = self.targets[min(self.state.chapter, len(self.chapters) - 1)]
        return sum(target.score(image) for target in targets) / len(targets)

    def preview(self) -> Tensor:
        """The image (3, h, w) in [0, 1] of the averaged latents."""
        return self.latents.image(self.state.finished[-1] if self.done else self.state.ema).cpu()

    def result(self) -> Result:
        """The best image of each chapter so far, in their order. Tokens of a grid that is not square are (rows,
        columns)."""
        state, values = self.state, list(self.state.finished)
        scores: list[float | None] = [*state.finished_scores]
        if not self.done:
            scored = state.best_score > -math.inf
            values.append(state.best if scored else state.ema)
            scores.append(state.best_score if scored else None)
        images = []
        for i, (value, score) in enumerate(zip(values, scores, strict=True)):
            tokens = self.latents.tokens(value).cpu()
            tokens = tokens.flatten() if tokens.shape[0] == tokens.shape[1] else tokens
            images.append(ResultImage(i, tokens, self.latents.image(value).cpu(), score))
        return Result(images, self.caption)

    def lost_texts(self) -> list[str]:
        """What the CLIPs do not read of the prompts, which are too long for them."""
        texts = [text for chapter in self.chapters for text, _ in chapter.prompts]
        return list(dict.fromkeys(filter(None, (clip.lost_text(text) for clip in self.clips for text in texts))))

    @property
    def caption(self) -> str:
        """The texts that the images are led to, the chapters separated by ^."""
        return " ^ ".join(filter(None, (chapter.caption for chapter in self.chapters))) or "images"

    # Saving

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What decides the images, ready for JSON; models by a hash of their content, images by one of their pixels."""
        images = [[[_hash(image), weight] for image, weight in chapter.image_prompts] for chapter in self.chapters]
        return {
            "prompts": [[list(prompt) for prompt in chapter.prompts] for chapter in self.chapters],
            "image_prompts": images, "start": _hash(self.start_tokens), "settings": asdict(self.settings),
            "models": [model.fingerprint() for model in (self.vae, *self.clips)],
        }  # fmt: skip

    def save(self, path: str | os.PathLike) -> None:
        """Writes all that `load` needs."""
        state = self.state
        tensors = {"value": state.value.detach(), "ema": state.ema, "best": state.best,
                   "history": torch.tensor(state.history, dtype=torch.float64).view(-1, 3)}  # fmt: skip
        tensors |= {f"finished.{i}": value for i, value in enumerate(state.finished)}
        moments = self.optimizer.state_dict()["state"].get(0, {})
        tensors |= {f"optimizer.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
        numbers = {name: vars(state)[name] for name in _NUMBERS}
        run = json.dumps({"made_with": self.made_with, "state": numbers})
        write_bytes(path, save({name: value.cpu().clone() for name, value in tensors.items()}, {"run": run}))

    def load(self, path: str | os.PathLike) -> None:
        """Goes on from what `save` wrote. Raises `CheckpointError` if that is of other settings, prompts or models."""
        with opening(path, "is not the state of a run of optimize"):
            with safe_open(path, "pt") as file:
                saved = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            recorded, given = saved["made_with"], json.loads(json.dumps(self.made_with))
            recorded, given = ({**made.pop("settings"), **made} for made in (recorded, given))
            other = sorted(name for name in given.keys() | recorded.keys() if given.get(name) != recorded.get(name))
            if other:
                raise CheckpointError(f"{path} is of a run with other {', '.join(other)}; begin anew without resuming")
            self._restore(tensors, saved["state"])

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        shape, names = self.state.value.shape, [f"finished.{i}" for i in range(len(numbers["finished_scores"]))]
        value, ema, best, *finished = (tensors[name].to(self.vae.device) for name in ("value", "ema", "best", *names))
        if wrong := [x for x in (value, ema, best, *finished) if x.shape != shape]:
            raise ValueError(f"latents {tuple(wrong[0].shape)}, expected {tuple(shape)}")
        history = [(int(i), loss, score) for i, loss, score in tensors["history"].tolist()]
        self._begin(value)
        self.state = _State(self.state.value, ema, best, finished=finished, history=history,
                            **{name: numbers[name] for name in _NUMBERS})  # fmt: skip
        moments = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("optimizer.")}
        if moments:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {0: moments}})


_NUMBERS = ("chapter", "iteration", "best_score", "best_iteration", "finished_scores")


def _hash(tensor: Tensor) -> str:
    """A hash of the shape and the values."""
    return f"{generator(tuple(tensor.shape), tensor.cpu().numpy().tobytes()).initial_seed():016x}"
