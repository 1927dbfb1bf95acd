"""The interface of a prior: a model of image tokens given text tokens. Sampling knows nothing else of it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.images import resize
from dalle_pytorch.nn.linear import Int8Linear
from dalle_pytorch.pretrained import PretrainedModel, companion_path
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.hug import HugTokenizer, companion_tokenizer
from dalle_pytorch.vae.base import ImageTokenizer

Cache = TypeVar("Cache", bound="PriorCache")


class PriorCache(Protocol):
    """A prior's state after some sequences, which one more image token extends at the cost of one token."""

    def gather(self, rows: Tensor, max_length: int, share: bool = True) -> Self:
        """A new cache whose sequence i continues this one's `rows[i]`, with room for `max_length` positions. `share`
        allows what takes less time and rounds by the number of sequences."""
        ...


class Prior(PretrainedModel, ABC, Generic[Cache]):
    """A distribution over grids of image tokens given a text.

    Attributes:
        vae: the image tokenizer whose tokens it models.
        tokenizer: the text tokenizer of its training, None if unknown.
        text_seq_len: text tokens of a prompt, padding included.
        image_fmap_size: side of the grid of image tokens.
        num_image_tokens: size of the codebook.
        max_length: positions that a cache needs for a whole sequence.
        num_filtered_tokens: how many tokens a fractional `top_k` counts over.
        sampling: its default sampling settings.
        tokenizer_type: of the `tokenizer.json` in or beside its folder.
    """

    vae: ImageTokenizer
    tokenizer: Tokenizer | None
    text_seq_len: int
    image_fmap_size: int
    num_image_tokens: int
    max_length: int
    num_filtered_tokens: int
    sampling: SamplingSettings = SamplingSettings(top_p=0.9)
    tokenizer_type: type[HugTokenizer] = HugTokenizer

    def set_vae(self, vae: ImageTokenizer, image_fmap_size: int | None, num_image_tokens: int | None) -> None:
        """Freezes the VAE, and takes the grid's side from it unless given. Raises `UsageError` for another codebook."""
        if num_image_tokens not in (None, vae.num_tokens):
            raise UsageError(f"expected a VAE of {num_image_tokens} image tokens, got {vae.num_tokens}")
        self.vae = vae.requires_grad_(False).eval()
        self.tokenizer = None
        self.image_fmap_size = image_fmap_size or vae.image_fmap_size
        self.num_image_tokens = self.num_filtered_tokens = vae.num_tokens

    def step_parts(self) -> list[nn.Module]:
        """The modules that a step runs."""
        return [module for name, module in self.named_children() if name != "vae"]

    @property
    def image_seq_len(self) -> int:
        """Image tokens of a grid."""
        return self.image_fmap_size**2

    @property
    def image_size(self) -> int:
        """Side in pixels of the images of a grid."""
        return self.image_fmap_size * 2**self.vae.num_layers

    @abstractmethod
    def next_token_logits(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        """The logits (b, n + 1, num_image_tokens) after each of the first 0 … n image tokens (b, n) of texts
        (b, text_seq_len), by one pass over the whole sequence; n of them for a whole grid."""

    @abstractmethod
    def prefill(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, Cache]:
        """The logits (b, num_image_tokens) after the first k image tokens (b, k), and a cache of the sequence."""

    @abstractmethod
    def step(self, tokens: Tensor, position: int, cache: Cache) -> Tensor:
        """The logits (b, num_image_tokens) after image tokens (b,) at `position` of the grid, which join the cache."""

    @abstractmethod
    def unconditional_text(self, text: Tensor) -> Tensor:
        """The empty prompts (b, text_seq_len) of classifier-free guidance."""

    @abstractmethod
    def check_text(self, text: Tensor) -> None:
        """Raises `UsageError` for tokens outside the vocabulary, from another tokenizer."""

    @property
    def is_int8(self) -> bool:
        """Whether its linear layers are `Int8Linear`, see `converted`."""
        return any(isinstance(module, Int8Linear) for module in self.modules())

    # Checkpoints

    def own_state_dict(self) -> dict[str, Tensor]:
        """Raises `UsageError` for int8 weights, which are made of those of a file and are not for one."""
        if self.is_int8:
            raise UsageError("a prior in int8 cannot be saved; open it with dtype float32")
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("vae.")}

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: torch.dtype | None = None, save_vae: bool = True
    ) -> None:
        """Writes the prior into `folder` and, unless `save_vae` is false, its VAE into `vae/` below, with a tokenizer
        of its own kind."""
        # Recorded to check another VAE against.
        self.config.pop("vae", None)
        self.config.update(image_fmap_size=self.image_fmap_size, num_image_tokens=self.num_image_tokens)
        if save_vae:
            self.vae.save_pretrained(Path(folder) / "vae", dtype)
            if self.tokenizer is not None and self.tokenizer_type is not HugTokenizer:
                self.tokenizer.save(Path(folder) / "tokenizer.json")
        super().save_pretrained(folder, dtype)

    @classmethod
    def companions(cls, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        if "vae" in overrides:
            return {}
        path = companion_path(folder, "vae")
        if path is None:
            raise CheckpointError(f"{folder} has no VAE (a folder vae in it or beside it); pass one as `vae`")
        return {"vae": ImageTokenizer.from_pretrained(path)}

    def opened(self, folder: Path) -> None:
        self.tokenizer = companion_tokenizer(folder, self.tokenizer_type)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.vae.eval()
        return self

    # Text and images

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Text tokens (b, text_seq_len) of prompts, truncated. Raises `UsageError` without a tokenizer, or for tokens
        outside the prior's vocabulary."""
        if self.tokenizer is None:
            raise UsageError("this prior has no tokenizer; set its `tokenizer`")
        text = self.tokenizer.tokenize(prompts, self.text_seq_len, truncate_text=True).to(self.device)
        self.check_text(text)
        return text

    def lost_text(self, prompt: str) -> str:
        """The end of a prompt that `tokenize` truncates, empty if it all fits."""
        return "" if self.tokenizer is None else self.tokenizer.lost_text(prompt, self.text_seq_len)

    def check_vocabulary(self, text: Tensor, known: int) -> None:
        """Raises `UsageError` for text tokens that are not below `known`."""
        if text.numel() and int(text.max()) >= known:
            raise UsageError(
                f"expected text tokens below {known}, got {int(text.max())}: the prior has another tokenizer"
            )

    def encode_image(self, image: Tensor) -> Tensor:
        """The image tokens (b, image_seq_len) of square images (b, 3, h, h) in [0, 1], resized as needed; tokens (b, n)
        are returned unchanged."""
        if image.ndim != 4:
            return image
        # The nearest code depends on small differences: no autocast.
        with torch.autocast(image.device.type, enabled=False):
            return self.vae.get_codebook_indices(resize(image, self.image_size))

    def num_init_tokens(self, count: int | None) -> int:
        """How many image tokens of an initial image to keep: `count`, or OpenAI's share, 14 rows of 32 by default."""
        count = int(0.4375 * self.image_seq_len) if count is None else count
        if not 0 <= count < self.image_seq_len:
            raise UsageError(f"expected 0 to {self.image_seq_len - 1} initial image tokens, got {count}")
        return count

    def generate_texts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[str]]:
        """Continues a text, see `DALLE.generate_texts`. Raises `UsageError` unless the prior models text too."""
        raise UsageError(f"a {type(self).__name__} cannot continue a text: it models images only")
