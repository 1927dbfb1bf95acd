"""The tokenizer that a command line names."""

import os
from pathlib import Path

from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.chinese import ChineseTokenizer
from dalle_pytorch.tokenizers.hug import HugTokenizer, companion_tokenizer
from dalle_pytorch.tokenizers.simple import SimpleTokenizer
from dalle_pytorch.tokenizers.yttm import YttmTokenizer


def load_tokenizer(
    path: str | os.PathLike | None = None,
    *,
    hug: bool = False,
    chinese: bool = False,
    beside: str | os.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer that DALLE-pytorch's `--bpe_path`, `--hug` and `--chinese` name.

    Without a path it is the `tokenizer.json` in or beside the native folder `beside`, else CLIP's, as in DALLE-pytorch.
    """
    if chinese:
        return ChineseTokenizer() if path is None else ChineseTokenizer(path)
    if path is not None:
        if hug or Path(path).suffix == ".json":
            return HugTokenizer(path)
        return SimpleTokenizer(path) if Path(path).suffix in (".txt", ".gz") else YttmTokenizer(path)
    found = companion_tokenizer(Path(beside)) if beside is not None and Path(beside).is_dir() else None
    return found or SimpleTokenizer()
