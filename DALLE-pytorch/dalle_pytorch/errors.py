"""Mistakes of the user. A command line shows their message, which is one line, and exits with code 2.

Every other exception is a bug and keeps its traceback, `ValueError` among them.
"""


def shorten(text: object, longest: int = 60) -> str:
    """A text for a message, of at most `longest` characters and "…"."""
    text = str(text)
    return text if len(text) <= longest else f"{text[:longest].rstrip()}…"


LONGEST_WORD = 240  # characters of a path or value that a message repeats


def as_message(text: object, longest: int) -> str:
    """A text in one line of at most `longest` characters: its middle left out if need be, control characters escaped.

    The middle of a longer word than `LONGEST_WORD` is left out too, so that what the message says of it stays.
    Characters are those that Unicode calls printable; surrogates, which no terminal takes, are escaped too.
    """
    line = " ".join(_without_middle(word, LONGEST_WORD) for word in str(text).split())
    for _ in range(2):  # escaping makes it longer
        line = _without_middle(line, longest)
        line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)
    return line[:longest]


def _without_middle(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - longest // 3 - 1]}…{text[-(longest // 3) :]}"


class UserError(ValueError):
    """Something that the user can correct. The message is one line that says what was given and what is expected."""

    longest = 1000  # characters of the message

    def __init__(self, message: object = ""):
        super().__init__(as_message(message, self.longest))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the one line, not the traceback (`%debug` goes to where it was raised)."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(UserError):
    """Arguments or settings that are out of range or do not go together."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""

    longest = 290  # with what a command line writes before it, at most 300


class TrainingDiverged(UserError):
    """The loss or gradient of a training was not finite in too many steps in a row."""


class SamplingDiverged(UserError):
    """Sampling reached logits, pixels or scores that are not finite; nothing of that batch is returned."""


class FileError(UserError):
    """An image, token or data file that cannot be used."""

    longest = 290
