"""Progress on the terminal."""

from __future__ import annotations

from tqdm import tqdm


class ProgressBar:
    """A bar that appears when it is first called with what is done and with all that is to do."""

    def __init__(self, description: str, unit: str):
        self.options = {"desc": description, "unit": unit, "unit_scale": True, "dynamic_ncols": True}
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, **self.options)
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
