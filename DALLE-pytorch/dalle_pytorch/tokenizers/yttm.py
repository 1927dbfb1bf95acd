"""YouTokenToMe's `.model` files."""

import os
import re
from itertools import pairwise

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.text import read_text
from dalle_pytorch.tokenizers.base import Tokenizer

MAX_BYTES = 64 * 2**20
MAX_NUMBER = 2**31  # ids and code points
MAX_PIECE = 1000  # characters of a token; those of trained vocabularies are words at most


class YttmTokenizer(Tokenizer):
    """A `.model` file of YouTokenToMe.

    The file is text: the number of characters and of merges; a line `code point, id` for each character; a line
    `left, right, result` for each merge in the order of training; the ids of unknown, padding, begin and end.
    """

    SPACE = "▁"  # begins every word

    def __init__(self, bpe_path: str | os.PathLike):
        with opening(bpe_path, "is not a complete YouTokenToMe model"):
            numbers = list(map(int, read_text(bpe_path, MAX_BYTES).split()))
            if max(map(abs, numbers)) >= MAX_NUMBER:
                raise ValueError(f"it has numbers beyond {MAX_NUMBER:,}")
            num_characters, num_merges, *rest = numbers
            characters = dict(zip(rest[: 2 * num_characters : 2], rest[1 : 2 * num_characters : 2], strict=True))
            merges = rest[2 * num_characters :][: 3 * num_merges]
            specials = rest[2 * num_characters + 3 * num_merges :]
            self._ids = {chr(code): i for code, i in characters.items()}
            self._space_id = self._ids[self.SPACE]
            self._merges, pieces = {}, {i: character for character, i in self._ids.items()}
            for rank, (left, right, result) in enumerate(zip(*(merges[i::3] for i in range(3)), strict=True)):
                # Two tokens may spell the same piece, so pieces cannot identify them.
                self._merges[left, right] = (rank, result)
                pieces[result] = pieces[left] + pieces[right]
                if len(pieces[result]) > MAX_PIECE:
                    raise ValueError(f"it has a token of more than {MAX_PIECE:,} characters")
            self._unknown, *_ = special_ids = specials[:4]
            self.unknown_id = self._unknown
            names = dict(zip(special_ids, ("<UNK>", "<PAD>", "<BOS>", "<EOS>"), strict=True))
            self._pieces = pieces | {i: name for i, name in names.items() if i >= 0}
            self.vocab_size = len(self._pieces)
            if min(num_characters, num_merges) < 0 or len(self._merges) != num_merges:
                raise ValueError("its tokens are not as many as it says")
            if self._pieces.keys() != set(range(self.vocab_size)):
                raise ValueError("its tokens are not numbered from 0 on")
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        # White space as in C's isspace, and the symbol for a space.
        ids = []
        for word in filter(None, re.split(f"[ \t\n\v\f\r{self.SPACE}]+", text)):
            if word not in self._words:
                if len(self._words) >= 65536:
                    self._words.clear()
                self._words[word] = self._merge(word)
            ids += self._words[word]
        return ids

    def _merge(self, word: str) -> list[int]:
        """The ids of one word: the earliest merge first, from the left, until none applies."""
        ids = [self._space_id]
        for character in word:
            i = self._ids.get(character, self._unknown)
            # A run of unknown characters is one token.
            if i != self._unknown or ids[-1] != i:
                ids.append(i)
        while True:
            rules = [(*self._merges[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in self._merges]
            if not rules:
                return ids
            _, result, at = min(rules)
            ids[at : at + 2] = [result]

    def _decode(self, ids: list[int]) -> str:
        try:
            pieces = [self._pieces[i] for i in ids]
        except KeyError as error:
            raise ValueError(f"expected tokens below {self.vocab_size}, got {error}") from None
        return "".join(re.sub(f"^{self.SPACE}", " ", piece) for piece in pieces).removeprefix(" ")

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        """The encoding as in a tokenizer.json. Raises `UsageError` if two tokens spell the same piece."""
        vocabulary = {piece: i for i, piece in self._pieces.items()}
        if len(vocabulary) < len(self._pieces):
            raise UsageError("two tokens of this vocabulary spell the same, which a tokenizer.json cannot represent")
        merges = [(self._pieces[left], self._pieces[right]) for left, right in self._merges]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<UNK>", fuse_unk=True))
        words = pre_tokenizers.Split(Regex(f"[ \\t\\n\\v\\f\\r{self.SPACE}]+"), behavior="removed")
        spaces = pre_tokenizers.Metaspace(self.SPACE, prepend_scheme="always", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, spaces])
        tokenizer.decoder = decoders.Metaspace(self.SPACE, prepend_scheme="always", split=False)
        return tokenizer
