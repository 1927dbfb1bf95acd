"""The text tokenizer of minDALL-E."""

import os
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.tokenizers.hug import HugTokenizer, read_bpe


class MinDALLETokenizer(HugTokenizer):
    """Byte-pair encoding of lower-cased characters within words, as `tokenizers`' CharBPETokenizer. `[PAD]` is added
    after the vocabulary where that lacks it."""

    def __init__(self, path: str | os.PathLike | tokenizers.Tokenizer):
        super().__init__(path)
        pad_id = self.tokenizer.token_to_id("[PAD]")
        if pad_id is None:
            raise CheckpointError(f"{path} has no token [PAD]")
        self.pad_id = pad_id

    @classmethod
    def from_files(cls, vocabulary: Path, merges: Path) -> "MinDALLETokenizer":
        """The tokenizer of `bpe-16k-vocab.json` and `bpe-16k-merges.txt`. Raises `CheckpointError` for other files."""
        tokenizer = read_bpe(vocabulary, merges, unk_token="[UNK]", end_of_word_suffix="</w>")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        tokenizer.add_special_tokens(["[UNK]", "[PAD]"])
        return cls(tokenizer)
