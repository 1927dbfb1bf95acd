"""BERT's vocabulary of Chinese characters."""

import os

import tokenizers

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.pretrained import first_line
from dalle_pytorch.tokenizers.base import Tokenizer


class ChineseTokenizer(Tokenizer):
    """BERT's vocabulary of Chinese characters and word pieces, from a local folder or the Hugging Face hub."""

    def __init__(self, path_or_name: str | os.PathLike = "bert-base-chinese"):
        from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

        try:
            self.tokenizer = BertTokenizerFast.from_pretrained(str(path_or_name))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path_or_name} is not a folder with a BERT vocabulary (vocab.txt) and cannot be downloaded from the "
                f"hub ({first_line(error)}); pass a folder with its files"
            ) from None
        self.vocab_size = self.tokenizer.vocab_size
        self.unknown_id = self.tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def to_hugging_face(self) -> tokenizers.Tokenizer:
        return self.tokenizer.backend_tokenizer
