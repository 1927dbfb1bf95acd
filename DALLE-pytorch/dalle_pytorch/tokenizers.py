"""Text to token ids and back: Hugging Face's tokenizer.json, CLIP's byte-pair vocabulary, YouTokenToMe's .model, and
BERT's Chinese characters, behind the same calls. Id 0 is padding in all of them."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
import re
import string
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import processors as post_processors
from torch import Tensor

from dalle_pytorch.checkpoints import CheckpointError, companion_path, write_text


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


# --------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json


class HugTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, without the special tokens that it may add around a text."""

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"there is no tokenizer file {path}")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from None
        self.tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=True)
        self.vocab_size = self.tokenizer.get_vocab_size()
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.unknown_id = None if unknown is None else self.tokenizer.token_to_id(unknown)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        return self.tokenizer.decode(_kept(ids, pad_tokens), skip_special_tokens=True)

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer


def train_bpe(captions: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learns byte-pair encoding (arXiv:1508.07909) of lower-cased captions; the same captions give the same result.

    Id 0 is `[PAD]`, 1 `[UNK]`. Runs of white space count as one space, and punctuation is never joined with a word.
    There are fewer than `vocab_size` tokens if the captions have no more to merge.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


# --------------------------------------------------------------------------------------------------
# CLIP's vocabulary

CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt"
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class SimpleTokenizer(Tokenizer):
    """CLIP's byte-pair encoding: 49,408 tokens that can spell any text, lower-cased.

    `bpe_path` is the list of merges, plain or gzipped, or a tokenizer.json with them. Left out, it is taken from an
    installed package that carries it, or downloaded.
    """

    def __init__(self, bpe_path: str | os.PathLike | None = None):
        merges = [tuple(line.split()) for line in _clip_vocabulary(bpe_path).split("\n")[1 : _CLIP_MERGES + 1]]
        if len(merges) < _CLIP_MERGES or any(len(pair) != 2 for pair in merges):
            raise CheckpointError(f"{bpe_path or CLIP_VOCABULARY} is not CLIP's list of {_CLIP_MERGES} merges")
        letters = _byte_letters()
        tokens = [
            *letters,
            *(f"{letter}</w>" for letter in letters),
            *("".join(pair) for pair in merges),
            *_CLIP_SPECIALS,
        ]
        self.vocab_size = len(tokens)
        self._ends = {tokens.index(token) for token in _CLIP_SPECIALS}
        self.tokenizer = tokenizers.Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>")
        )
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.tokenizer.add_special_tokens(list(_CLIP_SPECIALS))
        self._bytes = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(_clean(text).lower(), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        pieces = (self.tokenizer.id_to_token(i) for i in _kept(ids, {*self._ends, *pad_tokens}))
        return self._bytes.decode([piece for piece in pieces if piece]).replace("</w>", " ").strip()


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary: printable bytes come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _clean(text: str) -> str:
    """CLIP's clean-up: mends of `ftfy` where that is installed, NFC where not; HTML entities; white space."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def _clip_vocabulary(path: str | os.PathLike | None) -> str:
    """The text of CLIP's list of merges, which begins with a line that is none."""
    data = _packaged_vocabulary() if path is None else None
    if data is None:
        if path is None:
            from dalle_pytorch.downloads import CLIP_BPE, default_file

            path = default_file(CLIP_BPE)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"the vocabulary {path} cannot be read ({error.strerror})") from None
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        if not text.startswith("{"):
            return text
        merges = json.loads(text)["model"]["merges"]
        return "\n".join(["#", *(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        raise CheckpointError(f"the vocabulary {path} is damaged: it holds no list of merges") from None


def _packaged_vocabulary() -> bytes | None:
    """The vocabulary as an installed package carries it: CLIP and open_clip as a file, instant-clip-tokenizer as a text
    within its library."""
    for package in ("clip", "open_clip", "instant_clip_tokenizer"):
        # Finding a top-level package does not import it.
        spec = importlib.util.find_spec(package)
        for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
            for path in (folder / f"{CLIP_VOCABULARY}.gz", folder / CLIP_VOCABULARY):
                if path.is_file():
                    return path.read_bytes()
            for library in folder.glob("instant_clip_tokenizer.*"):
                data = library.read_bytes()
                start = data.find(b"#version: 0.2\ni n\nt h\n")
                if start >= 0:
                    return b"\n".join(data[start : start + 2**20].split(b"\n", _CLIP_MERGES + 1)[: _CLIP_MERGES + 1])
    return None


# --------------------------------------------------------------------------------------------------
# YouTokenToMe


class YttmTokenizer(Tokenizer):
    """A `.model` file of YouTokenToMe, read without it.

    The file is text: the number of characters and of merges; a line `code point, id` for each character; a line
    `left, right, result` for each merge in the order of training; the ids of unknown, padding, begin and end.
    """

    SPACE = "▁"  # begins every word

    def __init__(self, bpe_path: str | os.PathLike):
        try:
            numbers = list(map(int, Path(bpe_path).read_text("ascii").split()))
        except OSError as error:
            raise CheckpointError(f"the vocabulary {bpe_path} cannot be read ({error.strerror})") from None
        except ValueError:
            raise CheckpointError(f"{bpe_path} is not a YouTokenToMe model: it holds more than whole numbers") from None
        try:
            num_characters, num_merges, *rest = numbers
            characters = dict(zip(rest[: 2 * num_characters : 2], rest[1 : 2 * num_characters : 2], strict=True))
            merges = rest[2 * num_characters :][: 3 * num_merges]
            specials = rest[2 * num_characters + 3 * num_merges :]
            self._ids = {chr(code): i for code, i in characters.items()}
            self._space_id = self._ids[self.SPACE]
            self._merges, pieces = {}, {i: character for character, i in self._ids.items()}
            for rank, (left, right, result) in enumerate(zip(*(merges[i::3] for i in range(3)), strict=True)):
                # Two merges may spell the same piece and still be two tokens, so pieces cannot stand for ids.
                self._merges[left, right] = (rank, result)
                pieces[result] = pieces[left] + pieces[right]
            self.unknown_id, *_ = special_ids = specials[:4]
            names = dict(zip(special_ids, ("<UNK>", "<PAD>", "<BOS>", "<EOS>"), strict=True))
            if min(num_characters, num_merges) < 0 or len(self._merges) != num_merges:
                raise ValueError
        except (ValueError, KeyError, OverflowError):
            raise CheckpointError(f"{bpe_path} is not a whole YouTokenToMe model") from None
        self._pieces = pieces | {i: name for i, name in names.items() if i >= 0}
        self.vocab_size = len(self._pieces)
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        # White space as C's isspace has it, and the stand-in for a space.
        ids = []
        for word in filter(None, re.split(f"[ \t\n\v\f\r{self.SPACE}]+", text)):
            if word not in self._words:
                if len(self._words) >= 65536:
                    self._words.clear()
                self._words[word] = self._merge(word)
            ids += self._words[word]
        return ids

    def _merge(self, word: str) -> list[int]:
        """The ids of one word: the earliest rule is applied first, from the left, until none applies."""
        ids = [self._space_id]
        for character in word:
            i = self._ids.get(character, self.unknown_id)
            # A run of unknown characters is one token.
            if i != self.unknown_id or ids[-1] != i:
                ids.append(i)
        while True:
            rules = [(*self._merges[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in self._merges]
            if not rules:
                return ids
            _, result, at = min(rules)
            ids[at : at + 2] = [result]

    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        try:
            pieces = [self._pieces[i] for i in _kept(ids, pad_tokens)]
        except KeyError as error:
            raise ValueError(f"token {error} is outside this vocabulary of {self.vocab_size}") from None
        text = "".join(" " + piece[1:] if piece.startswith(self.SPACE) else piece for piece in pieces)
        return text.removeprefix(" ")

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        """The same encoding as a tokenizer.json has it. Raises `ValueError` where two tokens spell the same piece."""
        vocabulary = {piece: i for i, piece in self._pieces.items()}
        if len(vocabulary) < len(self._pieces):
            raise ValueError("two tokens of this vocabulary spell the same, which a tokenizer.json cannot hold")
        merges = [(self._pieces[left], self._pieces[right]) for left, right in self._merges]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<UNK>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(f"[ \\t\\n\\v\\f\\r{self.SPACE}]+"), behavior="removed"),
                pre_tokenizers.Metaspace(self.SPACE, prepend_scheme="always", split=False),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(self.SPACE, prepend_scheme="always", split=False)
        return tokenizer


# --------------------------------------------------------------------------------------------------
# BERT's Chinese characters


class ChineseTokenizer(Tokenizer):
    """BERT's vocabulary of Chinese characters and word pieces, from a local folder or the Hugging Face hub."""

    def __init__(self, path_or_name: str | os.PathLike = "bert-base-chinese"):
        from transformers import BertTokenizerFast

        try:
            self.tokenizer = BertTokenizerFast.from_pretrained(str(path_or_name))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path_or_name} is neither a folder with a BERT vocabulary (vocab.txt) nor to be had from the hub "
                f"({str(error).splitlines()[0]}); put its files into a folder and name that"
            ) from None
        self.vocab_size = self.tokenizer.vocab_size
        self.unknown_id = self.tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int] | Tensor, pad_tokens: Collection[int] = ()) -> str:
        return self.tokenizer.decode(_kept(ids, pad_tokens))

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer.backend_tokenizer


# --------------------------------------------------------------------------------------------------
# Which one


def load_tokenizer(
    path: str | os.PathLike | None = None,
    *,
    hug: bool = False,
    chinese: bool = False,
    beside: str | os.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer that DALLE-pytorch's `--bpe_path`, `--hug` and `--chinese` name.

    Without a path it is the `tokenizer.json` in or beside the native folder `beside`, or CLIP's, which is what
    DALLE-pytorch trains with when told nothing.
    """
    if chinese:
        return ChineseTokenizer() if path is None else ChineseTokenizer(path)
    if path is not None:
        if hug or Path(path).suffix == ".json":
            return HugTokenizer(path)
        return SimpleTokenizer(path) if Path(path).suffix in (".txt", ".gz") else YttmTokenizer(path)
    found = companion_path(Path(beside), "tokenizer.json") if beside is not None and Path(beside).is_dir() else None
    return SimpleTokenizer() if found is None else HugTokenizer(found)
