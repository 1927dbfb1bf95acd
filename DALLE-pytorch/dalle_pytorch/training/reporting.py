"""What can be seen of a run: `config.yaml`, `metrics.jsonl`, pictures in `samples`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import html
import json
import math
import statistics
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, save_image
from dalle_pytorch.training.options import TrainingOptions
from dalle_pytorch.training.state import Progress

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"


class Reporter:
    """Writes the settings of a run, and figures and pictures of its steps after `first_step`; what an earlier run noted
    of those is dropped."""

    def __init__(self, options: TrainingOptions, first_step: int = 0):
        self.folder = Path(options.output_dir)
        self.metrics = self.folder / METRICS_NAME
        if options.settings is not None:
            write_text(self.folder / CONFIG_NAME, yaml.safe_dump(options.settings, sort_keys=False, allow_unicode=True))
        self.tracker = _open_tracker(options, first_step)
        kept = [row for row in _rows(self.metrics) if row["step"] <= first_step]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Notes the figures of a step; what is no finite number becomes null."""
        finite = {name: round(value, 6) for name, value in figures.items() if math.isfinite(value)}
        row = {"step": step, **dict.fromkeys(figures), **finite}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker:
            self.tracker.scalars(step, finite)

    def previews(self, step: int, previews: dict[str, Tensor | str]) -> None:
        """Writes pictures (n, 3, h, w) in [0, 1] as one sheet each, and texts, to `samples/NAME-STEP`."""
        for name, preview in previews.items():
            path = self.folder / SAMPLES_NAME / f"{name}-{step:08}"
            if isinstance(preview, str):
                write_text(path.with_suffix(".txt"), preview + "\n")
                if self.tracker:
                    self.tracker.text(step, name, preview)
            else:
                sheet = contact_sheet(list(preview))
                save_image(path.with_suffix(".png"), sheet)
                if self.tracker:
                    self.tracker.picture(step, name, sheet)

    def close(self) -> None:
        """Sends what is still on its way."""
        if self.tracker:
            self.tracker.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, without a line that a killed run left half written."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Tracker(Protocol):
    """A place that draws curves."""

    def scalars(self, step: int, figures: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, picture: Image.Image) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


def _open_tracker(options: TrainingOptions, first_step: int) -> Tracker | None:
    trackers = {"none": lambda *_: None, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    if options.report_to not in trackers:
        raise UsageError(f"--report_to is one of {', '.join(trackers)}, not {options.report_to!r}")
    try:
        return trackers[options.report_to](options, first_step)
    except ImportError:
        raise UsageError(f"--report_to {options.report_to} needs a package: pip install {options.report_to}") from None


class TensorBoard:
    """Event files in `output_dir/tensorboard`; `tensorboard --logdir` on any folder above shows them."""

    def __init__(self, options: TrainingOptions, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(options.output_dir) / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `wandb_name`; a resumed training goes on with the same run, whose id its folder keeps."""

    def __init__(self, options: TrainingOptions, first_step: int):
        import wandb

        id_file = Path(options.output_dir) / "wandb-id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:12])
        self.wandb = wandb
        self.run = wandb.init(
            project=options.wandb_name, entity=options.wandb_entity, dir=options.output_dir, resume="allow",
            id=id_file.read_text("utf-8").strip(), config=options.settings,
        )  # fmt: skip

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self.run.finish()


def mean_figures(rows: Sequence[dict[str, Tensor | float]], processes: int = 1) -> dict[str, float]:
    """The mean of each figure over the batches of a step and over all processes, which must call together.

    Where a batch, or a process, does not have a figure, the others decide.
    """
    means = _means([{name: float(value) for name, value in row.items()} for row in rows])
    if processes == 1:
        return means
    gathered = [means] * processes
    torch.distributed.all_gather_object(gathered, means)
    return _means(gathered)


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}


class Rate:
    """How fast a run is, between one look and the next."""

    def __init__(self, progress: Progress):
        self.step, self.samples, self.time = progress.step, progress.samples, time.monotonic()

    def since_last(self, progress: Progress) -> dict[str, float]:
        """Seconds a step and images a second, in all processes together."""
        seconds = max(time.monotonic() - self.time, 1e-9)
        steps, images = progress.step - self.step, progress.samples - self.samples
        self.__init__(progress)
        return {"seconds": seconds / steps, "images_per_second": images / seconds}
