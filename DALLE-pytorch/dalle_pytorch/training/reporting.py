"""What can be seen of a run: `config.yaml`, `metrics.jsonl`, previews in `samples`, and accelerate's trackers."""

import json
import math
import statistics
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, save_image
from dalle_pytorch.training.settings import TrainingSettings
from dalle_pytorch.training.tasks.base import Preview

WANDB_ID_NAME = "wandb-id"  # by which a resumed training continues the same run


class Reporter:
    """Writes the settings of a run, and the metrics and previews of its steps after `first_step`; those that an earlier
    run recorded of these steps are dropped. For the main process alone."""

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, first_step: int = 0):
        self.folder, self.accelerator = Path(settings.output_dir), accelerator
        self.metrics_path = self.folder / "metrics.jsonl"
        config = yaml.safe_dump(settings.as_dict(), sort_keys=False, allow_unicode=True)
        write_text(self.folder / "config.yaml", config)
        kept = [row for row in _rows(self.metrics_path) if row["step"] <= first_step]
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        if settings.tracker == "tensorboard":  # event files in output_dir/tensorboard
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
        elif settings.tracker == "wandb":
            id_file = self.folder / WANDB_ID_NAME
            if not id_file.exists():
                write_text(id_file, uuid.uuid4().hex[:12])
            run = {"entity": settings.wandb_entity, "dir": str(self.folder), "resume": "allow",
                   "id": id_file.read_text("utf-8").strip(), "config": settings.as_dict()}  # fmt: skip
            accelerator.init_trackers(settings.wandb_name or "uncategorized", init_kwargs={"wandb": run})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step; what is not finite becomes null."""
        finite = {name: round(value, 6) for name, value in metrics.items() if math.isfinite(value)}
        row = {"step": step, **dict.fromkeys(metrics), **finite}
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log(finite, step)

    def log_previews(self, step: int, previews: Preview) -> None:
        """Writes images (n, 3, h, w) in [0, 1] as one sheet each, and texts, to `samples/NAME-STEP`."""
        for name, preview in previews.items():
            path = self.folder / "samples" / f"{name}-{step:08}"
            if isinstance(preview, str):
                write_text(path.with_suffix(".txt"), preview + "\n")
                self.accelerator.log({name: preview}, step)
            else:
                sheet = contact_sheet(list(preview))
                save_image(path.with_suffix(".png"), sheet)
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: np.asarray(sheet)[None]}, step, **layout)

    def close(self) -> None:
        """Sends what is still on its way."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


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


def mean_metrics(rows: Sequence[Mapping[str, Tensor | float]], processes: int = 1) -> dict[str, float]:
    """The mean of each metric over the batches of a step and over all processes, which must call together.

    Batches and processes without a metric do not count in its mean.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: statistics.fmean(float(row[name]) for row in rows if name in row) for name in names}
    if processes == 1:
        return means
    gathered = [means] * processes
    torch.distributed.all_gather_object(gathered, means)
    return mean_metrics(gathered)
