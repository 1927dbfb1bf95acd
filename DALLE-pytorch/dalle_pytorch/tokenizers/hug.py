"""Hugging Face's tokenizer.json, and byte-pair encoding trained into one."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import processors as post_processors

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.text import read_text
from dalle_pytorch.pretrained import companion_path, first_line
from dalle_pytorch.tokenizers.base import Tokenizer

SPACE = "▁"  # how a space is spelled in tokens
SPECIAL_TOKENS = ["[PAD]", "[UNK]"]
COVERAGE = 0.9995  # of the text: the share that must stay readable where there is no room for all characters

logger = logging.getLogger(__name__)


class HugTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, without the special tokens it may add around a text."""

    def __init__(self, path: str | os.PathLike | tokenizers.Tokenizer):
        self.tokenizer = path if isinstance(path, tokenizers.Tokenizer) else _read(Path(path))
        # Whoever saved it may have padded or truncated; here that is for the model to say.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=True)
        self.vocab_size = self.tokenizer.get_vocab_size()
        model = self.tokenizer.model
        if isinstance(model, (models.BPE, models.WordLevel, models.WordPiece)) and model.unk_token is not None:
            self.unknown_id = self.tokenizer.token_to_id(model.unk_token)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer file {path}")
    try:
        return tokenizers.Tokenizer.from_str(read_text(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} is not a tokenizer.json: {first_line(error)}") from None


def read_bpe(vocabulary: Path, merges: Path, **options: Any) -> tokenizers.Tokenizer:
    """Byte-pair encoding of a `vocab.json`, token to id, and a list of merges after a header line."""
    try:
        tokens = json.loads(read_text(vocabulary))
        pairs = [line.split(" ") for line in read_text(merges).split("\n")[1:] if line]
        return tokenizers.Tokenizer(models.BPE(tokens, [(left, right) for left, right in pairs], **options))
    except OSError as error:
        raise CheckpointError(f"the vocabulary {error.filename} cannot be read ({error.strerror})") from None
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{vocabulary} and {merges} are not a vocabulary: {first_line(error)}") from None


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
