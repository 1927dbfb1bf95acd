"""Pieces of HTML on the page. Whatever a visitor typed is escaped."""

import re
from collections.abc import Collection, Sequence
from html import escape

from dalle_pytorch.errors import shorten


def status(text: str, done: int | None = None, total: int = 1) -> str:
    """The line that says what the page is doing, with a progress bar of what is `done`."""
    bar = "" if done is None else f'<progress value="{done}" max="{total}"></progress>'
    return f'<div class="status" role="status" aria-live="polite">{bar}<span>{escape(text)}</span></div>'


def stopped(shown: str | None) -> str:
    """The status in place of `shown` where work ended before its time; empty if that has no progress bar."""
    percent = re.search(r"<progress .*<span>(\d{1,3}%)</span>", shown or "")
    return status(f"Stopped at {percent[1]}.") if percent else ""


def note(*sentences: str) -> str:
    """A remark below a field."""
    return f'<div class="note">{"".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)}</div>'


def marked(prompt: str, unknown: Collection[str], lost: str) -> str:
    """A prompt in which the words that the model has never seen are marked, and what it does not read of it; empty if
    there is nothing to say."""
    said = []
    if unknown:
        words = (f"<mark>{escape(word)}</mark>" if word in unknown else escape(word) for word in prompt.split())
        said.append(f"<p>{' '.join(words)}</p><p>The model has never seen the marked words.</p>")
    if lost:
        said.append(f"<p>Too long: the model does not read “{escape(shorten(lost, 200))}”.</p>")
    return f'<div class="note">{"".join(said)}</div>' if said else ""


def pick_style(picks: Sequence[int]) -> str:
    """The style sheet that frames the candidates of these numbers in the gallery, with a tick in their corner."""
    if not picks:
        return ""
    images = [f"#candidates .grid-container > :has([alt^='#{number} '])" for number in picks]
    frames, ticks = (", ".join(f"{image}::{part}" for image in images) for part in ("before", "after"))
    return f"<style>{frames} {{ content: ''; }} {ticks} {{ content: '✓'; }}</style>"
