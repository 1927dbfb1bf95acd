"""What a visitor of the page asks for, what of it is refused and why, and the file of settings that holds it.

torch is not imported, so that the command prints its help at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import read_json
from dalle_pytorch.settings import Settings, option
from text_to_image.inputs import clean_prompt

LONGEST_PROMPT = 2000  # characters


@dataclass
class Limits(Settings):
    """The most that one request may ask for, and that the page holds."""

    title: ClassVar[str] = "limits, beyond which the page refuses a request"
    max_images: int = option(32, "candidates", low=1, high=1024)
    max_picks: int = option(4, "images that are diffused", low=1, high=64)
    max_steps: int = option(100, "diffusion steps", low=1, high=1000)
    max_size: int = option(1024, "side in pixels of a diffused image", low=64, high=8192)
    max_upload: int = option(10, "size in MiB of an uploaded file", low=1, high=1024)
    max_waiting: int = option(20, "requests that wait", low=1, high=1000)
    max_visitors: int = option(50, "visitors whose images are kept; those of the one who was idle longest go first",
                               low=1, high=10_000)  # fmt: skip
    keep_minutes: int = option(60, "after which files and the images of an idle visitor are deleted", low=1,
                               high=10_000)  # fmt: skip


def check_prompt(text: Any) -> str:
    """A prompt as the model reads it. Raises `UsageError` for what is none."""
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("expected a prompt, which is text")
    if len(text) > LONGEST_PROMPT:
        raise UsageError(f"expected a prompt of at most {LONGEST_PROMPT} characters, got {len(text)}")
    return clean_prompt(text)


@dataclass
class Generation(Settings):
    """A request for candidates. `rows` is how many rows of tokens are kept of a given picture."""

    prompt: str = option("", kind=check_prompt)
    num_images: int = option(8, low=1)
    temperature: float = option(1.0, low=0)
    top_p: float = option(1.0, low=0, high=1, above=True)
    cond_scale: float = option(1.0, low=0)
    seed: int = option(0, low=0, high=2**32 - 1)
    rows: int = option(7, low=1)

    def refusals(self, limits: Limits) -> dict[str, str]:
        """Why the request is refused, by field; empty for one that is served."""
        return _within(self.problems(), num_images=(self.num_images, limits.max_images))


@dataclass
class Diffusion(Settings):
    """A request to redraw the candidates of these numbers. `size` is the side of the images, None the decoder's own."""

    picks: list[int] = option([], low=0)
    clip_guidance: bool = option(False)
    steps: int = option(25, low=1)
    size: int | None = option(None, low=64)

    def refusals(self, limits: Limits) -> dict[str, str]:
        """Why the request is refused, by field; empty for one that is served."""
        found = self.problems()
        if "picks" not in found and not self.picks:
            found["picks"] = "pick at least one image: click on it"
        return _within(found, picks=(len(self.picks or ()), limits.max_picks), steps=(self.steps, limits.max_steps),
                       size=(self.size, limits.max_size))  # fmt: skip


def _within(found: dict[str, str], **amounts: tuple[int | None, int]) -> dict[str, str]:
    """The refusals `found`, and those of amounts that are no mistake by themselves but more than the page allows."""
    for name, (amount, most) in amounts.items():
        if name not in found and amount is not None and amount > most:
            found[name] = f"this page allows at most {most}, got {amount}"
    return found


@dataclass(frozen=True)
class Saved:
    """The content of a file of settings.

    Attributes:
        init_image_tokens: the tokens that every candidate began with, of a picture that was completed.
        models: hashes of the networks that drew the images.
        loaded: whether the images are of tokens that were given. Of the generation only the prompt and the seed, that
            of the diffusion, are kept then.
    """

    generation: Generation
    diffusion: Diffusion
    init_image_tokens: list[int] | None = None
    models: Mapping[str, str] | None = None
    loaded: bool = False

    def to_json(self) -> str:
        generation = self.generation.as_dict()
        if self.loaded:
            generation = {name: generation[name] for name in ("prompt", "seed")}
        content = {**generation, **self.diffusion.as_dict(), "models": dict(self.models or {}),
                   "init_image_tokens": self.init_image_tokens}  # fmt: skip
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_settings(path: str | os.PathLike, num_tokens: int, image_seq_len: int) -> Saved:
    """Reads a file of settings; what it lacks is as by default.

    `num_tokens` is the size of the codebook and `image_seq_len` the tokens of an image of the model that it is for.
    Raises `FileError` for another file, and for values that no request has.
    """
    with opening("the file", "holds no settings of this page", FileError):
        content = read_json(path)
        if not isinstance(content, dict) or "prompt" not in content:
            raise ValueError("expected a prompt and its settings")
        saved = Saved(
            _filled(Generation, content), _filled(Diffusion, content), content.get("init_image_tokens"),
            content.get("models"),
        )  # fmt: skip
        tokens = saved.init_image_tokens
        if tokens is not None and not (are_tokens(tokens, num_tokens) and 0 < len(tokens) < image_seq_len):
            raise ValueError(f"init_image_tokens: expected less than {image_seq_len} tokens below {num_tokens}")
        if saved.models is not None and not isinstance(saved.models, dict):
            raise ValueError("models: expected hashes by name")
    return saved


def are_tokens(value: Any, num_tokens: int) -> bool:
    """Whether it is a list of tokens of a codebook of that size."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token < num_tokens for token in value)


def _filled(form: type[Any], content: Mapping[str, Any]) -> Any:
    values = {field.name: content[field.name] for field in fields(form) if field.name in content}
    filled = form(**values)
    for name, problem in filled.problems().items():
        raise ValueError(f"{name}: {problem}")
    return filled
