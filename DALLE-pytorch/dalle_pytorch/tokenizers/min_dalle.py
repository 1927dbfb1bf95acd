"""The text tokenizer of DALL·E mini and mega, as min-dalle has it."""

import os
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.tokenizers.hug import HugTokenizer, read_bpe

BEGIN, PAD, END = 0, 1, 2  # BART's <s>, <pad> and </s>
SPACE = "Ġ"  # begins every word


class MinDalleTokenizer(HugTokenizer):
    """Byte-pair encoding of lower-cased ASCII, other characters left out. Words end at blanks alone. `<s>` comes before
    a text and `</s>` after it, of which nothing is left where it is truncated."""

    pad_id = PAD

    def __init__(self, path: str | os.PathLike | tokenizers.Tokenizer):
        super().__init__(path)
        if [self.tokenizer.token_to_id(name) for name in ("<s>", "<pad>", "</s>")] != [BEGIN, PAD, END]:
            raise CheckpointError(f"{path}: expected <s>, <pad> and </s> as tokens 0 to 2")

    @classmethod
    def from_files(cls, vocabulary: Path, merges: Path) -> "MinDalleTokenizer":
        """The tokenizer of `vocab.json` and `merges.txt`. Raises `CheckpointError` for files that are not these."""
        tokenizer = read_bpe(vocabulary, merges, unk_token="<unk>")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex("[^\\x00-\\x7f]"), "")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Metaspace(SPACE, "always", split=False)]
        )
        tokenizer.decoder = decoders.Metaspace(SPACE, "always")
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return [BEGIN, *super().encode(text), END]

    def _decode(self, ids: list[int]) -> str:
        return super()._decode([i for i in ids if i not in (BEGIN, END)])

    def lost_text(self, text: str, context_length: int) -> str:
        return super().lost_text(text, context_length + 1)  # to lose </s> is no loss
