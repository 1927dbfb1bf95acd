"""CLIP's byte-pair encoding."""

import gzip
import html
import json
import os
import re
from pathlib import Path

import ftfy
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.text import read_text
from dalle_pytorch.tokenizers.base import Tokenizer

#: OpenAI's file as it is in CLIP's repository, MIT
CLIP_VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MAX_LENGTH = 16 * 2**20  # characters of a list of merges; CLIP's has 3 million
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class SimpleTokenizer(Tokenizer):
    """CLIP's byte-pair encoding: 49,408 tokens that can spell any text, lower-cased.

    `bpe_path` is a list of merges, plain or gzipped, or a tokenizer.json with them; CLIP's own by default.
    """

    def __init__(self, bpe_path: str | os.PathLike | None = None):
        path = CLIP_VOCABULARY if bpe_path is None else bpe_path
        lines = [line.split() for line in _clip_vocabulary(path)[1 : _CLIP_MERGES + 1]]
        merges = [(pair[0], pair[1]) for pair in lines if len(pair) == 2]
        if len(merges) < _CLIP_MERGES:
            raise CheckpointError(f"{path} is not CLIP's list of {_CLIP_MERGES} merges")
        letters = _byte_letters()
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *_CLIP_SPECIALS]
        self.vocab_size = len(tokens)
        self._ends = {tokens.index(token) for token in _CLIP_SPECIALS}
        self.tokenizer = tokenizers.Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>")
        )
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        self.tokenizer.add_special_tokens(list(_CLIP_SPECIALS))
        self._bytes = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(_clean(text).lower(), add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        pieces = (self.tokenizer.id_to_token(i) for i in ids if i not in self._ends)
        return self._bytes.decode([piece for piece in pieces if piece]).replace("</w>", " ").strip()


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary: printable bytes come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _clean(text: str) -> str:
    """CLIP's clean-up: wrongly decoded text, ligatures and wide letters mended; HTML entities; white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def _clip_vocabulary(path: str | os.PathLike) -> list[str]:
    """The lines of CLIP's list of merges, the first of which is a header."""
    with opening(path, "is damaged: it holds no list of merges"):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                text = file.read(MAX_LENGTH + 1)
        except gzip.BadGzipFile:  # a plain text
            text = read_text(path, MAX_LENGTH)
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it is longer than {MAX_LENGTH:,} characters")
        if text.startswith("{"):
            merges = json.loads(text)["model"]["merges"]
            return ["#", *(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)]
        return text.split("\n", _CLIP_MERGES + 1)
