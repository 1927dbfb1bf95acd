"""The interface of a tokenizer."""

from __future__ import annotations

import os
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import tokenizers
import torch
from torch import Tensor

from dalle_pytorch.files.atomic import write_text


class TextTooLongError(ValueError, RuntimeError):
    """A text of more tokens than there is room for. A RuntimeError too, which is what DALLE-pytorch raises."""


class Tokenizer(ABC):
    """What the tokenizers share."""

    vocab_size: int
    #: what a character outside the vocabulary becomes; None where there is no such character
    unknown_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, as many as it takes."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        """The text of ids; 0 and `pad_tokens` are left out."""

    def tokenize(self, texts: str | Sequence[str], context_length: int = 256, truncate_text: bool = False) -> Tensor:
        """Tokens (b, context_length) int64 of one text or several, padded with 0.

        A text of more tokens raises `TextTooLongError`, or is cut with `truncate_text`.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > context_length and not truncate_text:
                shown = text if len(text) <= 60 else f"{text[:60]}…"
                raise TextTooLongError(f"the text {shown!r} is {len(ids)} tokens, too long for {context_length}")
            ids = ids[:context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return result

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        """The same encoding as a tokenizer.json has it. Raises `ValueError` where that cannot hold it."""
        raise ValueError(f"a tokenizer.json cannot hold the encoding of a {type(self).__name__}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json. Raises `ValueError` where that cannot hold the encoding."""
        write_text(path, self.to_hugging_face().to_str(pretty=True) + "\n")

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text with characters that the vocabulary cannot spell, each once."""
        if self.unknown_id is None:
            return []
        words = dict.fromkeys(word.strip(string.punctuation) or word for word in text.split())
        return [word for word in words if self.unknown_id in self.encode(word)]


def _kept(ids: Sequence[int] | Tensor, left_out: Collection[int]) -> list[int]:
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return [i for i in ids if i != 0 and i not in left_out]
