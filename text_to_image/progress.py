"""Progress bars: on the terminal where a command asks for one, in a notebook by themselves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # of ipywidgets: what to install for it is told below
    from tqdm.auto import tqdm

Progress = Callable[[int, int], object]  # called with what is done, and with all that is to do


class ProgressBar:
    """A bar that appears when it is first called with what is done and with all that is to do."""

    def __init__(self, description: str, unit: str):
        self.options = {"desc": description, "unit": unit, "unit_scale": True, "dynamic_ncols": True}
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, **self.options)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which tqdm finds out in the same way."""
    return "ipykernel.zmqshell" in sys.modules


def as_progress(progress: Progress | bool | None, description: str, unit: str) -> Progress | None:
    """What is to be called with the progress of some work: the function that is given; with True a bar, with False
    nothing; unless given, a bar in a notebook, and nothing elsewhere."""
    progress = in_notebook() if progress is None else progress
    if not isinstance(progress, bool):
        return progress
    if progress and in_notebook() and find_spec("ipywidgets") is None:
        warnings.warn("ipywidgets is missing, without which a notebook shows bars as text: "
                      "pip install 'dalle-diffusion[notebook]'", stacklevel=3)  # fmt: skip
    return ProgressBar(description, unit) if progress else None
