"""The interface of a prior: a model of image tokens given text tokens. Sampling knows nothing else of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.hug import companion_tokenizer
from dalle_pytorch.vae.base import ImageTokenizer

Cache = TypeVar("Cache", bound="PriorCache")


class PriorCache(Protocol):
    """A prior's state after some sequences, which one more image token extends at the cost of one token."""

    def gather(self, rows: Tensor, max_length: int) -> Self:
        """A new cache whose sequence i continues this one's `rows[i]`, with room for `max_length` positions."""
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
    """

    vae: ImageTokenizer
    tokenizer: Tokenizer | None
    text_seq_len: int
    image_fmap_size: int
    num_image_tokens: int
    max_length: int
    num_filtered_tokens: int
    sampling: SamplingSettings = SamplingSettings(top_p=0.9)

    @property
    def image_seq_len(self) -> int:
        """Image tokens of a grid."""
        return self.image_fmap_size**2

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

    def opened(self, folder: Path) -> None:
        self.tokenizer = companion_tokenizer(folder)

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

    def encode_image(self, image: Tensor) -> Tensor:
        """The image tokens (b, image_seq_len) of square images (b, 3, h, h) in [0, 1], resized as needed; tokens (b, n)
        are returned unchanged."""
        if image.ndim != 4:
            return image
        # The nearest code depends on small differences: no autocast.
        with torch.autocast(image.device.type, enabled=False):
            return self.vae.get_codebook_indices(resize(image, self.image_fmap_size * 2**self.vae.num_layers))

    def num_init_tokens(self, count: int | None) -> int:
        """How many image tokens of an initial image to keep: `count`, or OpenAI's share, 14 rows of 32 by default."""
        count = int(0.4375 * self.image_seq_len) if count is None else count
        if not 0 <= count < self.image_seq_len:
            raise UsageError(f"expected 0 to {self.image_seq_len - 1} initial image tokens, got {count}")
        return count

    def generate_texts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[str]]:
        """Continues a text, see `DALLE.generate_texts`. Raises `UsageError` unless the prior models text too."""
        raise UsageError(f"a {type(self).__name__} cannot continue a text: it models images only")
