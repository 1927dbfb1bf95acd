"""File names made of prompts."""

from __future__ import annotations

import re


def safe_name(prompt: str, longest: int = 80) -> str:
    """A file name of the prompt's letters, digits and `-`, the rest `_`; never empty, never `..`."""
    name = re.sub(r"[^\w-]+", "_", prompt, flags=re.UNICODE).strip("_")
    # File systems count bytes, not characters.
    while len(name.encode("utf-8")) > longest:
        name = name[:-1]
    return name.rstrip("_") or "prompt"
