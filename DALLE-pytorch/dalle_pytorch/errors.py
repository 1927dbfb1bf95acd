"""Mistakes of the user. A command line shows their message, which is one line, and exits with code 2.

Every other exception is a bug and keeps its traceback, `ValueError` among them.
"""


def shorten(text: object, longest: int = 60) -> str:
    """A text for a message, of at most `longest` characters and "…"."""
    text = str(text)
    return text if len(text) <= longest else f"{text[:longest].rstrip()}…"


class UserError(ValueError):
    """Something that the user can correct. The message is one line that says what was given and what is expected."""


class UsageError(UserError):
    """Arguments or settings that are out of range or do not go together."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class TrainingDiverged(UserError):
    """The loss or gradient of a training was not finite in too many steps in a row."""


class SamplingDiverged(UserError):
    """Sampling reached logits or pixels that are not finite; nothing of that batch is returned."""


class FileError(UserError):
    """An image, token or data file that cannot be used."""
