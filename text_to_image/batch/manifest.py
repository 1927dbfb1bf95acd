"""The manifest: a row for every image of a job, assembled from the parts of its units."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dalle_pytorch.files.atomic import atomic_write
from text_to_image.batch.folder import FAILED_NAME, JobFolder

PARQUET, JSONL = "manifest.parquet", "manifest.jsonl"
ROWS = 65_536  # of a row group


def assemble(folder: JobFolder) -> Path:
    """Writes `manifest.parquet`, or without pyarrow `manifest.jsonl`, and `failed.jsonl`; returns the manifest's path.

    Memory does not grow with the number of images.
    """
    with atomic_write(folder.path / FAILED_NAME) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for totals in folder.done():
            for failure in totals["failed"]:
                file.write(json.dumps(failure, ensure_ascii=False) + "\n")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path = folder.path / JSONL
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row in folder.rows():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return path
    whole, number, text = pyarrow.int64(), pyarrow.float64(), pyarrow.string()
    schema = pyarrow.schema({
        "key": text, "number": whole, "prompt": text, "rank": whole, "candidate": whole, "score": number,
        "upscaled": pyarrow.bool_(), "seed": pyarrow.uint64(), "top_k": number, "top_p": number, "temperature": number,
        "cond_scale": number, "width": whole, "height": whole, "file": text, "shard": text,
    })  # fmt: skip
    path = folder.path / PARQUET
    with atomic_write(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for rows in _groups(folder.rows()):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    (folder.path / JSONL).unlink(missing_ok=True)  # of a run without pyarrow
    return path


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, ROWS)):
        yield group
