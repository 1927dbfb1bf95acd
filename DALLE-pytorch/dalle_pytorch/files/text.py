"""Text files as people have them: UTF-8, or UTF-16 and UTF-32 with a byte order mark; a mark is no part of the text."""

import codecs
import os
from pathlib import Path

from dalle_pytorch.errors import FileError

_MARKS = (  # UTF-32's begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, see `decode_text`. Raises `OSError`, and `FileError` if it is in another encoding."""
    try:
        return decode_text(Path(path).read_bytes())
    except FileError as error:
        raise FileError(f"{path} {error}") from None


def decode_text(data: bytes, errors: str = "strict") -> str:
    """The text in some bytes. Raises `FileError`, whose message lacks the name, if it is in another encoding."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        noun = "UTF-8" if encoding == "utf-8-sig" else f"the {encoding.upper()} that its first bytes announce"
        raise FileError(f"is not a text in {noun} (byte {error.start}: {error.reason})") from None


def one_line(text: str) -> str:
    """A text with single spaces, and without the byte order marks that joined files have in their middle."""
    return " ".join(text.replace("\ufeff", "").split())
