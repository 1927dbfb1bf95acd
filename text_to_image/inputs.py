"""What people give: prompts and the files to upscale. torch is not imported, so that a mistake is told at once."""

from pathlib import Path

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.text import decode_text, one_line, read_text

CAPTION_NAME = "caption.txt"


def clean_prompt(prompt: str) -> str:
    """A prompt in lower case, as in the earlier systems, with single spaces. Raises `UsageError` for an empty one."""
    prompt = one_line(prompt.replace("\0", " ")).lower()
    if not prompt:
        raise UsageError("a prompt is empty; say in a few words what to draw")
    return prompt


def read_prompts(text: str | None, path: Path | None) -> list[str]:
    """The different prompts in a text, separated by `|`, or in a file, one a line. Raises `UsageError`."""
    if path is None:
        prompts = (text or "").split("|")
    else:
        prompts = [line for line in map(one_line, read_text(path).splitlines()) if line]
        if not prompts:
            raise UsageError(f"{path} holds no prompt")
    return list(dict.fromkeys(map(clean_prompt, prompts)))


def find_inputs(path: Path, keep: int | None = None) -> list[Path]:
    """The files to upscale; those in a folder by number, which is their rank. Raises `UsageError` without any."""
    if not path.exists():
        raise UsageError(f"there is no {path}; expected a .npy of tokens, a folder of them, or an image")
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.npy"), key=lambda file: (not file.stem.isdecimal(), len(file.stem), file.stem))
    if not found:
        raise UsageError(f"{path} holds no .npy of tokens; generate.py writes them with --output_npy")
    return found[:keep]


def read_caption(path: Path) -> str | None:
    """The caption of the folder that `path` is or is in, lower-cased; None without one."""
    caption = (path if path.is_dir() else path.parent) / CAPTION_NAME
    return one_line(decode_text(caption.read_bytes(), "replace")).lower() or None if caption.is_file() else None
