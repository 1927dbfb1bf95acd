"""A job from its settings to its outputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

import dalle_pytorch
from dalle_pytorch.devices import pick_device, release_memory
from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.lock import locked
from dalle_pytorch.sampling.dtypes import check_dtype, choose_dtype
from text_to_image.batch.driver import Driver, Totals, Watch
from text_to_image.batch.executor import Executor, WorkerConfig
from text_to_image.batch.folder import PROMPTS_NAME, REJECTED_NAME, Job, JobFolder, counts_of
from text_to_image.batch.local import DRAWING, LocalExecutor, Place
from text_to_image.batch.manifest import assemble
from text_to_image.batch.plan import Counts, Defaults, write_plan
from text_to_image.batch.prompts import digest, is_address, list_files, read_rows
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.stages import check
from text_to_image.batch.tasks import unit_size
from text_to_image.model import Model
from text_to_image.pipeline import TextToImage
from text_to_image.results import make_writable

WORKER_BYTES = 2**30  # of a worker on a CPU: the libraries and a batch
MakeExecutor = Callable[[WorkerConfig], Executor]
Planned = Callable[[Counts, Totals, Executor], object]


@dataclass
class Ended:
    """How a run of a job ended.

    Attributes:
        finished: whether nothing is missing.
        counts: of the list; `totals`, of what is done, earlier runs included.
        manifest: the file that was written, once all is done.
    """

    finished: bool
    counts: Counts
    totals: Totals
    manifest: Path | None = None


def run_job(
    settings: BatchSettings,
    make_executor: MakeExecutor | None = None,
    *,
    watch: Watch | None = None,
    planned: Planned | None = None,
    reading: Callable[[int], object] | None = None,
    stop: Callable[[], object] = lambda: False,
) -> Ended:
    """Does what is missing of a job.

    Args:
        make_executor: where tasks run; as the settings say unless given.
        watch: see `Driver`.
        planned: called before the first task, with what the list came to and what is done already.
        reading: called with the number of rows of the list that are read.
        stop: asked often; the job ends where it is once this is true.

    Raises `UserError` for what is wrong with the list or the models, for other settings than the job was begun with,
    and where another process has this job.
    """
    folder = JobFolder(make_writable(settings.outputs_dir))
    with locked(folder.path, "a job"), _workers_place(settings) as (device, workers):
        folder.clear()
        files = list_files(settings.prompts)
        job, config = prepare(folder, settings, files, reading, device)
        totals = Totals()
        for done in folder.done():
            if settings.retry_failed and done["failed"]:
                folder.forget([done["unit"]])
            else:
                totals.add(done)
        counts = counts_of(job)
        finished = totals.prompts == counts.prompts
        if not finished:
            finished = _draw(folder, settings, job, config, totals, make_executor or workers, watch, planned, stop)
        return Ended(finished, counts, totals, assemble(folder) if finished else None)


def _draw(folder: JobFolder, settings: BatchSettings, job: Job, config: WorkerConfig, totals: Totals,
          make_executor: MakeExecutor, watch: Watch | None,
          planned: Planned | None, stop: Callable[[], object]) -> bool:  # fmt: skip
    """Runs the units that are missing; whether that is all of them."""
    executor = make_executor(config)
    try:
        folder.log("start", workers=executor.workers, done=totals.prompts)
        if planned is not None:
            planned(counts_of(job), totals, executor)
        missing = (unit for unit in folder.units(job) if not folder.is_done(unit))
        finished = Driver(folder, settings, executor, totals, watch, stop).run(missing)
        folder.log("end", finished=finished)
        return finished
    finally:
        executor.close()


def with_own_diffusion(settings: BatchSettings, model: Model) -> BatchSettings:
    """The settings with those of the model where diffusion is left to it."""
    own: dict[str, Any] = {}
    if settings.diffuse:
        own = {"steps": settings.steps or model.num_inference_steps, "sampler": settings.sampler or model.sampler}
    if settings.clip_guidance and settings.clip_guidance_scale is None:
        own["clip_guidance_scale"] = model.guidance.get("clip_guidance_scale")
    return replace(settings, **own)


def prepare(folder: JobFolder, settings: BatchSettings, files: list[str],
            reading: Callable[[int], object] | None = None,
            device: str | None = None) -> tuple[Job, WorkerConfig]:  # fmt: skip
    """The job of a folder, planned if it is new, and what its workers are told.

    `device` is the kind that they draw on, by default this machine's.

    Raises `UsageError` for settings that the models cannot follow, and for another job than that of the settings.
    """
    known = folder.read_job()
    if known is None:
        folder.check_unused()
    # On the CPU, and only to look at: the workers have their own.
    pipe = TextToImage.from_pretrained(device="cpu", **{**settings.parts(), "dtype": "float32"})
    pipe.model.open(*(name for name in settings.part_names() if name != "tokenizer"))
    settings = with_own_diffusion(settings, pipe.model)
    check(pipe, settings)
    device = device or pick_device(settings.device).type
    check_dtype(settings.dtype, torch.device(device))
    if settings.dtype == "auto":
        settings = replace(settings, dtype=choose_dtype(pipe.model.prior, device))
    fingerprints = pipe.model.fingerprints(*settings.part_names())
    weights = sum(pipe.model.num_bytes(name) for name in settings.part_names() if name != "tokenizer")
    config = WorkerConfig(settings, fingerprints, images_folder(settings, files), weights)
    sampling = pipe.sampling(top_k=settings.top_k, top_p=settings.top_p, temperature=settings.temperature,
                             cond_scale=settings.cond_scale)  # fmt: skip
    recorded = settings.recorded() | ({"guidance": pipe.model.guidance} if settings.clip_guidance else {})
    job = Job(recorded, asdict(sampling), fingerprints, device, digest(files),
              {"torch": torch.__version__, "dalle": dalle_pytorch.__version__})  # fmt: skip
    if known is not None:
        if difference := known.difference(job):
            raise UsageError(f"{folder.path} was begun with {difference}; go on with that, or choose another "
                             "--outputs_dir")  # fmt: skip
        return known, config
    most = None if settings.clip_sort else settings.keep
    defaults = Defaults(settings.seed, settings.num_images, sampling, config.images,
                        settings.truncate_text, most)  # fmt: skip
    counts = write_plan(read_rows(files, dict(settings.columns)), pipe.model.prior, defaults,
                        folder.path / PROMPTS_NAME, folder.path / REJECTED_NAME, pipe.model.unknown_words,
                        reading)  # fmt: skip
    if not counts.prompts:
        raise FileError(f"{settings.prompts} has no prompt that can be used{_first_reason(folder)}")
    kept = min(settings.keep or settings.num_images, settings.num_images) + settings.diffuse
    job.unit_prompts = unit_size(settings.unit_prompts, counts.prompts, settings.num_images, settings.batch_size, kept)
    job.counts = asdict(counts)
    folder.write_job(job)
    del pipe
    release_memory(torch.device("cpu"))
    return job, config


def _first_reason(folder: JobFolder) -> str:
    rejected = next(iter(folder.rejected()), None)
    return "" if rejected is None else f": {rejected['place']}: {rejected['reason']}"


def images_folder(settings: BatchSettings, files: list[str]) -> str:
    """The folder or address that images of prompts are below: of the list, unless told."""
    if settings.images_dir is not None:
        return settings.images_dir
    return files[0].rpartition("/")[0] if is_address(files[0]) else os.path.dirname(os.path.abspath(files[0]))


def _workers_place(settings: BatchSettings) -> AbstractContextManager[tuple[str, MakeExecutor]]:
    """Within it workers can be made: gives the kind of device that they draw on, and what makes them."""
    if settings.ray is None:
        return nullcontext((pick_device(settings.device).type, local_executor))
    from text_to_image.batch.ray_executor import cluster

    return cluster(settings)


def local_executor(config: WorkerConfig) -> LocalExecutor:
    """Processes on this machine. With GPUs, files are encoded by one more."""
    settings = config.settings
    device = pick_device(settings.device)
    if device.type != "cuda":
        count = settings.num_workers or _cpu_workers(config)
        return LocalExecutor(config, [Place(str(device), settings.threads)] * count)
    named = settings.device is not None and device.index is not None
    devices = [str(device)] if named else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    count = settings.num_workers or len(devices)
    places = [Place(devices[number % len(devices)], settings.threads, DRAWING) for number in range(count)]
    return LocalExecutor(config, [*places, Place("cpu", 1, ("pack",))])


def _cpu_workers(config: WorkerConfig) -> int:
    """One for so many cores as each has threads, but not more than there is memory for."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory = psutil.virtual_memory().available // (WORKER_BYTES + 2 * config.weights)
    return max(1, min(cores // config.settings.threads, int(memory)))
