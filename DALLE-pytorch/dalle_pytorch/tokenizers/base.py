"""The interface of a tokenizer."""

import hashlib
import json
import os
import re
import string
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import islice

import tokenizers
import torch
from torch import Tensor

from dalle_pytorch.errors import UsageError, shorten
from dalle_pytorch.files.atomic import write_text

_HAN = "\u2e80-\u9fff\uf900-\ufaff"  # written without spaces between words
_WORDS = re.compile(f"[{_HAN}]|[^\\s{_HAN}]+")


class TextTooLongError(UsageError, RuntimeError):
    """A text of more tokens than the context length. A RuntimeError too, as in DALLE-pytorch."""


class Tokenizer(ABC):
    """Text to token ids and back. `pad_id` is padding."""

    vocab_size: int
    pad_id: int = 0
    #: id of characters outside the vocabulary, None if the vocabulary can spell any text
    unknown_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids, none of which is padding."""

    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        """The text of ids, without padding and `pad_tokens`."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self._decode([i for i in ids if i != self.pad_id and i not in pad_tokens])

    def tokenize(self, texts: str | Sequence[str], context_length: int = 256, truncate_text: bool = False) -> Tensor:
        """Tokens (b, context_length) int64 of one text or several, padded with `pad_id`.

        A longer text raises `TextTooLongError`, or is truncated with `truncate_text`.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        result = torch.full((len(texts), context_length), self.pad_id)
        for row, text in zip(result, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > context_length and not truncate_text:
                raise TextTooLongError(
                    f"the text {shorten(text)!r} has {len(ids)} tokens, expected at most {context_length}"
                )
            ids = ids[:context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return result

    def lost_text(self, text: str, context_length: int) -> str:
        """The end of a text that `tokenize` truncates, from the first word (or Chinese character) that is not whole."""
        if len(self.encode(text)) <= context_length:
            return ""
        # A word has a token or more.
        ends = [0, *(word.end() for word in islice(_WORDS.finditer(text), context_length + 1))]
        kept = bisect_right(ends, context_length, key=lambda end: len(self.encode(text[:end]))) - 1
        return text[ends[kept] :].strip()

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        """The encoding as in a tokenizer.json. Raises `UsageError` if that cannot represent it."""
        raise UsageError(f"a {type(self).__name__} cannot be saved as a tokenizer.json")

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json. Raises `UsageError` if that cannot represent the encoding."""
        write_text(path, self.to_hugging_face().to_str(pretty=True) + "\n")

    def fingerprint(self) -> str:
        """A hash of what every id stands for, and of how texts are split into them."""
        texts = [self.decode([i]) for i in range(1, self.vocab_size)]
        return hashlib.sha256(json.dumps([texts, self.encode(" ".join(texts))]).encode()).hexdigest()

    def unknown_words(self, text: str) -> list[str]:
        """The distinct words of a text with characters outside the vocabulary."""
        if self.unknown_id is None:
            return []
        words = dict.fromkeys(word.strip(string.punctuation) or word for word in text.split())
        return [word for word in words if self.unknown_id in self.encode(word)]
