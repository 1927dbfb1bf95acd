"""BERT's vocabulary of Chinese characters."""

import os
from pathlib import Path

import tokenizers

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.pretrained import download
from dalle_pytorch.tokenizers.base import Tokenizer

FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json")


class ChineseTokenizer(Tokenizer):
    """BERT's vocabulary of Chinese characters and word pieces, from a local folder or the Hugging Face hub."""

    def __init__(self, path_or_name: str | os.PathLike = "bert-base-chinese"):
        from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

        folder = Path(path_or_name)
        expected = f"{path_or_name} is not a folder with a BERT vocabulary (vocab.txt)"
        if not folder.is_dir():
            folder = download(str(path_or_name), FILES, expected)
        # transformers makes up a vocabulary of special tokens where there is none.
        if not any((folder / name).is_file() for name in FILES[:2]):
            raise CheckpointError(expected)
        with opening(folder, "is not a BERT vocabulary"):
            self.tokenizer = BertTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            self.vocab_size, self.unknown_id = self.tokenizer.vocab_size, self.tokenizer.unk_token_id
            if self.vocab_size <= len(self.tokenizer.all_special_ids):
                raise ValueError("it has no words")
            self.decode(self.encode("a 的"))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer.backend_tokenizer
