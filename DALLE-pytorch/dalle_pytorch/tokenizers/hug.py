"""Hugging Face's tokenizer.json, and byte-pair encoding trained into one."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import processors as post_processors

from dalle_pytorch.checks import MAX_SIZE
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import MAX_JSON_BYTES, read_json
from dalle_pytorch.files.text import read_text
from dalle_pytorch.pretrained import companion_path
from dalle_pytorch.tokenizers.base import Tokenizer

SPACE = "▁"  # how a space is spelled in tokens
SPECIAL_TOKENS = ["[PAD]", "[UNK]"]
MAX_GROWTH = 1000  # of a text by the replacements that are made in it
COVERAGE = 0.9995  # of the text: the share that must stay readable where there is no room for all characters

logger = logging.getLogger(__name__)


class HugTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, without the special tokens it may add around a text."""

    def __init__(self, path: str | os.PathLike | tokenizers.Tokenizer):
        with opening("the tokenizer" if isinstance(path, tokenizers.Tokenizer) else path, "is not a tokenizer.json"):
            self.tokenizer = path if isinstance(path, tokenizers.Tokenizer) else _read(Path(path))
            # Whoever saved it may have padded or truncated; here that is for the model to say.
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=True)
            self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())
            if self.vocab_size > MAX_SIZE:
                raise ValueError(f"it has the id {self.vocab_size - 1}, expected less than {MAX_SIZE:,}")
            model = self.tokenizer.model
            if isinstance(model, (models.BPE, models.WordLevel, models.WordPiece)) and model.unk_token is not None:
                self.unknown_id = self.tokenizer.token_to_id(model.unk_token)
            with _silent():  # what is inconsistent fails where it is used
                self.tokenizer.decode(self.tokenizer.encode("A word.").ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer file {path}")
    text = read_text(path, MAX_JSON_BYTES)
    if _growth(json.loads(text)) > MAX_GROWTH:
        raise ValueError("its replacements make any text too long")
    with _silent():
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def _silent() -> Iterator[None]:
    """Hides what Rust writes about a panic, which is an exception here too."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _growth(part: Any) -> int:
    """How many times longer the replacements in a part of a tokenizer.json may make a text, one after the other."""
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = len(str(part.get("content"))) if isinstance(part, dict) and "pattern" in part and "content" in part else 1
    return max(own, 1) * math.prod(map(_growth, (each for each in parts if isinstance(each, (dict, list)))))


def read_bpe(vocabulary: Path, merges: Path, **options: Any) -> tokenizers.Tokenizer:
    """Byte-pair encoding of a `vocab.json`, token to id, and a list of merges after a header line."""
    with opening(vocabulary, f"and {merges} are not a vocabulary"):
        tokens = read_json(vocabulary)
        pairs = [line.split(" ") for line in read_text(merges, MAX_JSON_BYTES).split("\n")[1:] if line]
        return tokenizers.Tokenizer(models.BPE(tokens, [(left, right) for left, right in pairs], **options))


def companion_tokenizer(folder: Path, kind: type[HugTokenizer] = HugTokenizer) -> HugTokenizer | None:
    """The `tokenizer.json` in a model's folder or beside it, or None."""
    path = companion_path(folder, "tokenizer.json")
    return None if path is None else kind(path)


def train_bpe(captions: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains byte-pair encoding (arXiv:1508.07909) on lower-cased captions, deterministically.

    Id 0 is `[PAD]`, 1 `[UNK]`. Runs of white space count as one space, and punctuation is never merged with a word.
    There are fewer than `vocab_size` tokens if the captions have no more pairs to merge. If they have more different
    characters than there is room for, only the commonest are known, as many as spell `COVERAGE` of the captions and
    fit; `captions` are then read three times.
    """
    tokenizer = _train_bpe(captions, vocab_size)
    if tokenizer.get_vocab_size() <= vocab_size:
        return tokenizer
    counts = Counter(chain.from_iterable(map(tokenizer.normalizer.normalize_str, captions)))
    del counts[" "]  # always known: it begins every caption too
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    spelled = accumulate(counts[character] for character in ranked)
    enough = 1 + sum(total < COVERAGE * counts.total() for total in spelled)
    kept = ranked[: min(enough, vocab_size - len(SPECIAL_TOKENS) - 1)]
    logger.warning("of %d different characters in the captions the %d rarest become unknown, as vocab_size is %d",
                   len(ranked), len(ranked) - len(kept), vocab_size)  # fmt: skip
    return _train_bpe(captions, vocab_size, [SPACE, *kept])


def _train_bpe(captions: Iterable[str], vocab_size: int, alphabet: Sequence[str] | None = None) -> tokenizers.Tokenizer:
    """Knows the characters of `alphabet`, or of all captions."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    limits = {} if alphabet is None else {"initial_alphabet": list(alphabet), "limit_alphabet": len(alphabet)}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False, **limits)
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
