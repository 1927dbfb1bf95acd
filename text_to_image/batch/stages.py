"""The stages of a job on one device: prompts to tokens, tokens to ranked images, those redrawn, and all as files.

Every stage is a pure function of its items: the same items in the same batch give the same bytes on every worker of one
kind of machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.errors import CheckpointError, FileError
from dalle_pytorch.files.images import decode_image, tensor_to_image
from dalle_pytorch.sampling.filters import require_finite
from dalle_pytorch.sampling.loop import Prefix, evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from diffusion.guidance import ClipGuidance
from text_to_image.batch.executor import WorkerConfig
from text_to_image.batch.outputs import Packer
from text_to_image.batch.plan import read_image_bytes
from text_to_image.batch.prune import Pruning
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import STAGES, Candidate, Chosen, Draw, Drawn, Finished, Packed, Prompt, Scored
from text_to_image.pipeline import TextToImage, Upscaled
from text_to_image.results import Result, ResultImage


def check(pipe: TextToImage, settings: BatchSettings) -> None:
    """Raises `UsageError` for settings that these models cannot follow, of which every prompt would fail."""
    prior = pipe.model.prior
    prior.num_init_tokens(settings.num_init_img_tokens)
    if settings.diffuse:
        tokens = torch.zeros(prior.image_seq_len, dtype=torch.int64)
        redraw(pipe, settings, [ResultImage(0, tokens, torch.zeros(3, 1, 1))], [0])


def redraw(pipe: TextToImage, settings: BatchSettings, inputs: Sequence[ResultImage], seeds: Sequence[int],
           guidance: ClipGuidance | bool = False) -> Iterator[Upscaled]:  # fmt: skip
    """The inputs, redrawn by the diffusion decoder in one batch. Raises `UsageError` at once, before anything is drawn,
    for settings that are out of range."""
    return pipe.upscale_each(
        Result(list(inputs)), batch_size=len(inputs), num_inference_steps=settings.steps, sampler=settings.sampler,
        seed=seeds, output_size=settings.output_size, clip_guidance=guidance,
    )  # fmt: skip


class Stages:
    """The models that some stages need, on a device.

    Raises `CheckpointError` if they are not those of the driver.
    """

    def __init__(self, config: WorkerConfig, device: str, stages: Sequence[str] = STAGES):
        self.config, self.settings = config, config.settings
        self.pipe = TextToImage.from_pretrained(device=device, **self.settings.parts())
        needed_by = _NEEDED_BY | ({"scorer": ("sample", *_NEEDED_BY["scorer"])} if self.settings.prune else {})
        needed = [name for name in self.settings.part_names() if set(stages) & set(needed_by[name])]
        self.pipe.model.open(*(name for name in needed if name != "tokenizer"))
        for name, found in self.pipe.model.fingerprints(*needed).items():
            if found != config.fingerprints[name]:
                raise CheckpointError(f"a worker opens another {name} than the job began with ({found[:8]}, not "
                                      f"{config.fingerprints[name][:8]}): its files have changed")  # fmt: skip
        self.packer = Packer(self.settings, config.fingerprints)
        self.prefix: tuple[object, Prefix] | None = None  # of the last prompts, and of the last texts of CLIP
        self.text_features: tuple[object, Tensor] | None = None

    def run(self, stage: str, items: Sequence[Any]) -> list[Any]:
        """The results of some items, one each."""
        return {"sample": self.sample, "score": self.score, "diffuse": self.diffuse, "pack": self.pack}[stage](items)

    # sample

    def sample(self, items: Sequence[Draw]) -> list[np.ndarray]:
        """The image tokens (count, image_seq_len) int64 of candidates of prompts with equal sampling settings; -1 those
        of candidates that were dropped."""
        prior, prompts = self.pipe.model.prior, tuple(item.prompt for item in items)
        with evaluation(prior):
            text, prefix = prior.tokenize([prompt.text for prompt in prompts]), self._prefix(prompts)
            rows = [i for i, item in enumerate(items) for _ in range(item.count)]
            uniforms = [
                candidate_uniforms(item.prompt.seed, text[i], range(item.first, item.first + item.count),
                                   prior.image_seq_len)
                for i, item in enumerate(items)
            ]  # fmt: skip
            tokens = sample_image_tokens(prior, prefix, torch.tensor(rows, device=prior.device), torch.cat(uniforms),
                                         prompts[0].sampling, select=self._pruning(items)).cpu().numpy()  # fmt: skip
        ends = np.cumsum([item.count for item in items])[:-1]
        return [part.copy() for part in np.split(tokens, ends)]

    def _pruning(self, items: Sequence[Draw]) -> Pruning | None:
        if not self.settings.prune or self.settings.keep is None:
            return None
        texts, counts = [item.prompt.text for item in items], [item.count for item in items]

        def score(tokens: Tensor, counts: Sequence[int]) -> list[float]:
            return self._scores(texts, counts, self._images(tokens)) or []

        return Pruning(self.pipe.model.prior.image_fmap_size, counts, self.settings.keep, score)

    def _prefix(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts after their pass through the prior; the blocks of one prompt need it one after the other."""
        key = [(prompt.text, prompt.image_hash, prompt.sampling.cond_scale) for prompt in prompts]
        if self.prefix is None or self.prefix[0] != key:
            self.prefix = None  # first: two may not fit in memory
            prior = self.pipe.model.prior
            text = prior.tokenize([prompt.text for prompt in prompts])
            images = [self._init_tokens(prompt) for prompt in prompts if prompt.image is not None]
            prefix = prefill(prior, text, torch.stack(images).to(prior.device) if images else None,
                             prompts[0].sampling.cond_scale)  # fmt: skip
            self.prefix = key, prefix
        return self.prefix[1]

    def _init_tokens(self, prompt: Prompt) -> Tensor:
        """The image tokens that the candidates of a prompt begin with."""
        data = read_image_bytes(self.config.images, prompt.image)
        if hashlib.sha256(data).hexdigest() != prompt.image_hash:
            raise FileError(f"image {prompt.image} has changed since the job began")
        return self.pipe.encode_init_image(decode_image(data), self.settings.num_init_img_tokens)

    # score

    def score(self, items: Sequence[Drawn]) -> list[Scored]:
        """The images of candidates, decoded and scored; of each item the best that may be kept."""
        prior = self.pipe.model.prior
        drawn = [np.flatnonzero(item.tokens[:, 0] >= 0) for item in items]  # not dropped
        counts = [len(rows) for rows in drawn]
        with evaluation(prior):
            tokens = np.concatenate([item.tokens[rows] for item, rows in zip(items, drawn, strict=True)])
            images = self._images(torch.from_numpy(tokens).to(prior.device))
            scores = self._scores([item.prompt.text for item in items], counts, images)
            pixels = images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        results, start = [], 0
        for item, rows, count in zip(items, drawn, counts, strict=True):
            own = None if scores is None else scores[start : start + count]
            best = range(count) if own is None else heapq.nlargest(count, range(count), key=own.__getitem__)
            kept = [
                Candidate(item.first + int(rows[i]), item.tokens[rows[i]].copy(), pixels[start + i].copy(),
                          None if own is None else own[i])
                for i in list(best)[: self.settings.keep]
            ]  # fmt: skip
            results.append(Scored(kept, own or []))
            start += count
        return results

    def _images(self, tokens: Tensor) -> Tensor:
        """(n, 3, h, w) in [0, 1] of grids (n, image_seq_len) of tokens."""
        images = self.pipe.model.prior.vae.decode_image(tokens)
        require_finite(images.isfinite().all(), "pixels of the image tokenizer")
        return images

    def _scores(self, texts: list[str], counts: Sequence[int], images: Tensor) -> list[float] | None:
        """CLIP's cosine similarities, n of them, of images (n, 3, h, w) to their prompts, `counts` of each."""
        if not self.settings.clip_sort:
            return None
        clip = self.pipe.model.scorer
        if self.text_features is None or self.text_features[0] != texts:
            self.text_features = texts, clip.encode_text(clip.tokenize(texts).to(clip.device))
        rows = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=clip.device)
        scores = F.cosine_similarity(self.text_features[1][rows], clip.encode_image(images.to(clip.device)))
        require_finite(scores.isfinite().all(), "scores")
        return [round(score, SCORE_DIGITS) for score in scores.tolist()]

    # diffuse

    def diffuse(self, items: Sequence[Chosen]) -> list[np.ndarray]:
        """The images (h, w, 3) uint8 that the diffusion decoder makes of candidates; of one prompt, with guidance."""
        settings = self.settings
        inputs = [
            ResultImage(item.candidate.index, torch.from_numpy(item.candidate.tokens),
                        torch.from_numpy(item.candidate.pixels).permute(2, 0, 1).float() / 255)
            for item in items
        ]  # fmt: skip
        guidance = False
        if settings.clip_guidance:
            guidance = self.pipe.guidance(items[0].prompt.text, clip_guidance_scale=settings.clip_guidance_scale)
        upscaled = redraw(self.pipe, settings, inputs, [item.prompt.seed for item in items], guidance)
        return [np.array(tensor_to_image(image.pixels)) for image in upscaled]

    # pack

    def pack(self, items: Sequence[Finished]) -> list[Packed]:
        """The files of prompts, and their rows of the manifest."""
        return [self.packer.pack(item) for item in items]


SCORE_DIGITS = 6
_NEEDED_BY = {
    "prior": ("sample", "score"), "tokenizer": ("sample",), "scorer": ("score", "diffuse"),
    "decoder": ("diffuse",), "super_resolution": ("diffuse",),
}  # fmt: skip
