"""From the rows of a list to the prompts of a job: what can be used is numbered, the rest is set aside with its reason.

Memory does not grow with the list: prompts go to a file as they are read, and what was seen is in a database on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UsageError, UserError, shorten
from dalle_pytorch.files.atomic import atomic_write
from dalle_pytorch.files.images import LARGEST_FILE, decode_image
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.settings import SamplingSettings
from text_to_image.batch.prompts import BadRow, Row, is_address, open_address
from text_to_image.batch.settings import SAMPLING
from text_to_image.batch.tasks import Prompt
from text_to_image.inputs import clean_prompt

LONGEST_PROMPT = 10_000  # characters: no model reads them
LONGEST_KEY = 200  # characters
LARGEST_SEED = 2**64 - 1
LARGEST_COUNT = 2**24


@dataclass(frozen=True)
class Defaults:
    """What a prompt has unless its row says otherwise."""

    seed: int
    num_images: int
    sampling: SamplingSettings
    images: str  # the folder or address that images are in
    truncate_text: bool = False
    most_images: int | None = None  # that are drawn of a prompt, whatever its row says


@dataclass
class Counts:
    """What a list came to."""

    prompts: int = 0
    candidates: int = 0
    rejected: int = 0
    unknown: int = 0  # prompts with words that the model has never seen


def merge_sampling(base: SamplingSettings, given: Mapping[str, float | None]) -> SamplingSettings:
    """Settings with those given (not None) in their place; `top_p` replaces `top_k` too. Raises `UsageError`."""
    found = {name: value for name, value in given.items() if value is not None}
    return replace(base, **({"top_k": None, **found} if "top_p" in found else found))


class Checker:
    """Turns rows into prompts, or says why not. `prior` is the model that is to read them."""

    def __init__(self, prior: Prior, defaults: Defaults, seen: sqlite3.Connection):
        self.prior, self.defaults, self.seen, self.number = prior, defaults, seen, 0
        seen.execute("create table seen (digest blob primary key, place text) without rowid")

    def check(self, row: Row) -> Prompt | BadRow:
        text = str(row.values.get("prompt", ""))
        try:
            return self._prompt(row, text)
        except UserError as error:
            return BadRow(row.place, str(error), shorten(text, 200))

    def _prompt(self, row: Row, text: str) -> Prompt:
        values, defaults = row.values, self.defaults
        if not isinstance(values.get("prompt", ""), str):
            raise UsageError(f"the prompt is no text but {shorten(text)}")
        if not text.strip():
            raise UsageError("empty")
        if len(text) > LONGEST_PROMPT:
            raise UsageError(f"too long: {len(text)} characters")
        text = clean_prompt(text)
        self.prior.tokenize(text)
        if not defaults.truncate_text and (lost := self.prior.lost_text(text)):
            raise UsageError(f"too long: this model reads {self.prior.text_seq_len} tokens, and would leave out "
                            f"{shorten(lost, 100)!r}")  # fmt: skip
        prompt = Prompt(
            self.number, str(values.get("key", self.number)), row.place, text,
            _number(values, "seed", int, 0, LARGEST_SEED, defaults.seed),
            min(_number(values, "num_images", int, 1, LARGEST_COUNT, defaults.num_images),
                defaults.most_images or LARGEST_COUNT),
            merge_sampling(defaults.sampling, {name: _number(values, name, float) for name in SAMPLING}),
            image=values.get("image"),
        )  # fmt: skip
        if len(prompt.key) > LONGEST_KEY:
            raise UsageError(f"its key has more than {LONGEST_KEY} characters")
        if prompt.image is not None:
            data = read_image_bytes(defaults.images, prompt.image)
            try:
                decode_image(data)
            except UserError as error:
                raise UsageError(f"image {shorten(prompt.image)} cannot be read: {error}") from None
            prompt = replace(prompt, image_hash=hashlib.sha256(data).hexdigest())
        self._note(prompt, "key" in values)
        self.number += 1
        return prompt

    def _note(self, prompt: Prompt, has_key: bool) -> None:
        """Raises `UsageError` for a key, or without keys a row, that was there before."""
        identity = prompt.key if has_key else repr(replace(prompt, number=0, key="", place=""))
        key = hashlib.blake2b(f"{has_key}{identity}".encode(), digest_size=16).digest()
        if not self.seen.execute("insert or ignore into seen values (?, ?)", (key, prompt.place)).rowcount:
            ((place,),) = self.seen.execute("select place from seen where digest = ?", (key,))
            raise UsageError(f"duplicate key {shorten(prompt.key)!r}, as at {place}" if has_key
                            else f"duplicate of {place}")  # fmt: skip


def _number(values: Mapping[str, Any], name: str, kind: type, low: float = -1e12, high: float = 1e12,
            default: Any = None) -> Any:  # fmt: skip
    """A number in a row, or in a text of it."""
    value = values.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    noun = "a number" if kind is float else f"a whole number from {low} to {high}"
    problem = UsageError(f"{name} is {shorten(value)!r}, expected {noun}")
    try:
        number = kind(value) if isinstance(value, str | int) else kind(float(value))
    except (ValueError, OverflowError, TypeError):
        raise problem from None
    whole = kind is float or not isinstance(value, float) or number == value
    if isinstance(value, bool) or not whole or not low <= number <= high:  # NaN too
        raise problem
    return number


def read_image_bytes(folder: str, name: object) -> bytes:
    """The content of an image file below `folder`. Raises `UsageError` for one that is elsewhere or is not there."""
    if not isinstance(name, str) or "\0" in name:
        raise UsageError(f"image is {shorten(name)!r}, expected the path of a file")
    inside = not (os.path.isabs(name) or is_address(name) or "::" in name or ".." in name.replace("\\", "/").split("/"))
    if not inside:
        raise UsageError(f"image {shorten(name)!r} is no path below the folder of the list; --images_dir names another")
    address = f"{folder.rstrip('/')}/{name}" if is_address(folder) else os.path.join(folder, name)
    if not (is_address(address) or os.path.isfile(address)):
        raise UsageError(f"there is no image {shorten(name)}")
    try:
        with open_address(address) as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"image {shorten(name)} cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST_FILE:
        raise UsageError(f"image {shorten(name)} has over {LARGEST_FILE >> 20} MiB")
    return data


def write_plan(rows: Iterable[Row | BadRow], prior: Prior, defaults: Defaults, prompts_path: Path,
               rejected_path: Path, unknown_words: Callable[[str], list[str]] = lambda prompt: [],
               progress: Callable[[int], object] | None = None) -> Counts:  # fmt: skip
    """Writes the prompts of some rows, and the rows that cannot be used with the reason, as JSON lines.

    `unknown_words` are those of a prompt that the model has never seen; `progress` is called with the rows read so far.
    """
    counts = Counts()
    database = prompts_path.with_name(".seen.sqlite")
    database.unlink(missing_ok=True)
    seen = sqlite3.connect(database, isolation_level=None)
    try:
        seen.execute("pragma journal_mode = off")
        seen.execute("pragma synchronous = off")
        seen.execute("begin")
        checker = Checker(prior, defaults, seen)
        with (
            atomic_write(prompts_path) as good, atomic_write(rejected_path) as bad,
            open(good, "w", encoding="utf-8") as good_file, open(bad, "w", encoding="utf-8") as bad_file,
        ):  # fmt: skip
            for read, row in enumerate(rows, 1):
                found = row if isinstance(row, BadRow) else checker.check(row)
                if isinstance(found, BadRow):
                    counts.rejected += 1
                    bad_file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
                else:
                    counts.prompts, counts.candidates = counts.prompts + 1, counts.candidates + found.num_images
                    counts.unknown += bool(unknown_words(found.text))
                    good_file.write(json.dumps(_as_json(found, defaults.sampling), ensure_ascii=False) + "\n")
                if progress is not None:
                    progress(read)
    finally:
        seen.close()
        database.unlink(missing_ok=True)
    return counts


def _as_json(prompt: Prompt, usual: SamplingSettings) -> dict[str, Any]:
    """A prompt without what goes without saying."""
    content = {field.name: getattr(prompt, field.name) for field in fields(Prompt)}
    content["sampling"] = None if prompt.sampling == usual else asdict(prompt.sampling)
    return {name: value for name, value in content.items() if value is not None}


def read_plan(path: Path, usual: SamplingSettings) -> Iterator[Prompt]:
    """The prompts that `write_plan` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            content = json.loads(line)
            sampling = content.pop("sampling", None)
            yield Prompt(**content, sampling=SamplingSettings(**sampling) if sampling else usual)
