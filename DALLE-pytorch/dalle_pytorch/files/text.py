"""Text files as people have them: UTF-8, or UTF-16 and UTF-32 with a byte order mark; a mark is no part of the text."""

import codecs
import os

from dalle_pytorch.errors import FileError

_MARKS = (  # UTF-32's begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def read_text(path: str | os.PathLike, most: int | None = None) -> str:
    """The text of a file, see `decode_text`.

    Raises `OSError`, `FileError` if it is in another encoding, and `ValueError` if it has more than `most` bytes.
    """
    with open(path, "rb") as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return decode_text(data)
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
