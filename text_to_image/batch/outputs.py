"""The files of a unit: WebDataset shards that trainings read as they are, or folders as `generate` writes them."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_pytorch.files.atomic import atomic_write
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import Finished, Packed, Prompt, Unit
from text_to_image.results import Result, ResultImage, safe_name

SHARDS, UPSCALED, FOLDERS = "shards", "upscaled", "images"  # folders of the job
DIFFUSION = ("steps", "sampler", "output_size", "clip_guidance", "clip_guidance_scale")


class Packer:
    """Encodes the images of prompts. `models` are the hashes that go into the files."""

    def __init__(self, settings: BatchSettings, models: Mapping[str, str]):
        self.settings, self.models = settings, dict(models)
        if settings.dtype != "float32":
            self.models["dtype"] = settings.dtype

    def pack(self, item: Finished) -> Packed:
        """The files of a prompt by name within its unit, and a row of the manifest for each image."""
        return self._samples(item) if self.settings.output_format == "shards" else self._folder(item)

    def made_with(self, prompt: Prompt) -> dict[str, Any]:
        """What decides the images of a prompt."""
        made = {"prompt": prompt.text, "key": prompt.key, "seed": prompt.seed, "num_images": prompt.num_images,
                "keep": self.settings.keep, "ranked": self.settings.clip_sort, "settings": asdict(prompt.sampling),
                "models": self.models}  # fmt: skip
        if prompt.image is not None:
            made |= {"image": prompt.image, "image_hash": prompt.image_hash}
        if self.settings.prune:
            made["pruned"] = True
        if self.settings.diffuse:
            made["diffusion"] = {name: getattr(self.settings, name) for name in DIFFUSION}
        return made

    def _samples(self, item: Finished) -> Packed:
        """KEY.png, KEY.npy, KEY.json and KEY.txt of each candidate, and of those redrawn in a shard of their own: a
        training reads either."""
        files, rows, suffix = {}, [], self.settings.image_format
        made, caption = self.made_with(item.prompt), f"{item.prompt.text}\n".encode()
        for shard, images in ((SHARDS, [candidate.pixels for candidate in item.kept]), (UPSCALED, item.redrawn)):
            for rank, pixels in enumerate(images):
                key, candidate = f"{item.prompt.name}-{rank}", item.kept[rank]
                facts = {**made, "rank": rank, "candidate": candidate.index, "score": candidate.score}
                files[f"{shard}/{key}.{suffix}"] = self._encode(pixels)
                files[f"{shard}/{key}.npy"] = _npy(candidate.tokens)
                files[f"{shard}/{key}.json"] = json.dumps(facts, ensure_ascii=False).encode()
                files[f"{shard}/{key}.txt"] = caption
                rows.append({**_row(item, rank, pixels, redrawn=shard == UPSCALED), "shard": shard,
                             "file": f"{key}.{suffix}"})  # fmt: skip
        return Packed(files, rows)

    def _folder(self, item: Finished) -> Packed:
        """The files of `Result.write`, in a folder of the prompt's."""
        name = f"{item.prompt.name}-{safe_name(item.prompt.text, 60)}"
        redrawn = [_tensor(pixels) for pixels in item.redrawn]
        images = [
            ResultImage(candidate.index, torch.from_numpy(candidate.tokens), _tensor(candidate.pixels), candidate.score,
                        upscaled_pixels=tuple(redrawn[rank : rank + 1]))
            for rank, candidate in enumerate(item.kept)
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name
            Result(images, item.prompt.text).write(folder, made_with=self.made_with(item.prompt))
            files = {f"{FOLDERS}/{name}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
        files[f"{FOLDERS}/{name}/caption.txt"] = f"{item.prompt.text}\n".encode()
        rows = []
        for rank, candidate in enumerate(item.kept):
            score = "" if candidate.score is None else f"-{candidate.score:.4f}"
            pairs = [(f"{rank}{score}.png", candidate.pixels)]
            pairs += [(f"{rank}-upscaled.png", pixels) for pixels in item.redrawn[rank : rank + 1]]
            rows += [{**_row(item, rank, pixels, redrawn=redrawn > 0), "shard": None, "file": f"{name}/{file}"}
                     for redrawn, (file, pixels) in enumerate(pairs)]  # fmt: skip
        return Packed(files, rows)

    def _encode(self, pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        options = {"lossless": True} if self.settings.image_format == "webp" else {}
        Image.fromarray(pixels).save(buffer, self.settings.image_format.upper(), **options)
        return buffer.getvalue()


def _row(item: Finished, rank: int, pixels: np.ndarray, *, redrawn: bool) -> dict[str, Any]:
    """What the manifest says of an image."""
    prompt, candidate = item.prompt, item.kept[rank]
    height, width = pixels.shape[:2]
    return {"key": prompt.key, "number": prompt.number, "prompt": prompt.text, "rank": rank,
            "candidate": candidate.index, "score": candidate.score, "upscaled": redrawn, "seed": prompt.seed,
            **asdict(prompt.sampling), "width": width, "height": height}  # fmt: skip


def write_outputs(job: Path, unit: Unit, packed: Sequence[Packed]) -> list[dict[str, Any]]:
    """Writes the files of a unit into the folder of a job, each shard or folder atomically and always as the same
    bytes. Returns the rows of the manifest, with the paths of files below `job`."""
    kinds = dict.fromkeys(name.partition("/")[0] for prompt in packed for name in prompt.files)
    for kind in kinds:
        files = ((name.partition("/")[2], data) for prompt in packed for name, data in prompt.files.items()
                 if name.startswith(f"{kind}/"))  # fmt: skip
        if kind == FOLDERS:
            _write_folder(job / kind / unit.name, files)
        else:
            _write_shard(job / kind / f"{unit.name}.tar", files)
    rows = [row for prompt in packed for row in prompt.rows]
    return [
        {**row, "shard": f"{row['shard']}/{unit.name}.tar"} if row["shard"]
        else {**row, "file": f"{FOLDERS}/{unit.name}/{row['file']}"} for row in rows
    ]  # fmt: skip


def _write_shard(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with atomic_write(path) as temporary:
        for name, data in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)


def _npy(tokens: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype(np.int64), allow_pickle=False)
    return buffer.getvalue()


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """(channels, h, w) in [0, 1]; `tensor_to_image` gives exactly these pixels again."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
