"""The training task of CLIP: the contrastive loss, with hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.filters import draw
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.training.tasks.base import Batch, Loss, TrainingTask, write_tokenizer

REDRAWN_SHARE = 0.5  # of the images, where there is a prior
TEMPERATURES = (0.5, 1.5)  # at which it redraws them
REDRAWN_TOP_K = 32


class AttributeReader(nn.Linear):
    """Reads attributes, of so many classes each, from features of captions and of images alike."""

    def __init__(self, dim: int, attributes: Sequence[int]):
        super().__init__(dim, sum(attributes))
        self.attributes = list(attributes)

    def loss(self, latents: Tensor, wanted: Tensor) -> Tensor:
        """The summed cross-entropy of attributes (b, k), -100 where unknown, from normalised features (b, dim)."""
        logits = self(latents * self.in_features**0.5).split(self.attributes, dim=1)
        losses = [F.cross_entropy(each, values, ignore_index=-100, reduction="sum")
                  for each, values in zip(logits, wanted.unbind(1), strict=True)]  # fmt: skip
        return torch.stack(losses).sum()


class ClipTask(TrainingTask):
    """The contrastive loss of CLIP over the batch of all processes, with hard negatives where the data have them:
    `negative_captions`, equally many for each image, and a second pair, under the same keys after `second_`, which
    differs a little from the first.

    Where the data have `attributes` (b, k), class indices, one linear map predicts them from the features of the image
    and from those of the caption alike; `caption_attributes`, where the data have them, are those that the caption
    tells. `attributes` are the numbers of classes. The contrastive loss alone is slow to learn word order: a caption
    and the same with its two subjects exchanged.

    Images are shifted, scaled, blurred and made noisy at random, a little: CLIP will judge sampled images, and guide on
    cutouts of half-denoised ones. With a `prior` half of them, at random, are redrawn by it: each token anew, given the
    caption and the image's own tokens before it. So they have the faults of sampled images, for one pass of the prior.
    Images of another size than CLIP's are scaled to it.

    `accuracy` is the share of the images whose caption is the likeliest of all that they are compared with.
    """

    def __init__(self, clip: CLIP, smallest_crop: float = 0.8, noise: float = 0.06,
                 attributes: Sequence[int] = (), prior: Prior | None = None):  # fmt: skip
        super().__init__()
        if prior is not None and prior.vae.channels != 3:
            raise UsageError("this prior draws images with opacity, and CLIP sees opaque ones")
        self.prior = None if prior is None else prior.requires_grad_(False).eval()
        self.clip, self.smallest_crop, self.noise = clip, smallest_crop, noise
        self.read = AttributeReader(clip.dim_latent, attributes) if attributes else None

    def forward(self, batch: Batch) -> Loss:
        images = torch.cat(_of_both_pairs(batch, "image"))
        captions = [*chain(*_of_both_pairs(batch, "caption"))]
        others = [*chain(*_of_both_pairs(batch, "negative_captions"))]
        images = self._redrawn(images.float() / 255, captions)
        images = self._augment(resize(images, self.clip.image_size))
        captions = captions + [caption for row in others for caption in row]
        text = self.clip.tokenize(captions)
        # Columns of padding alone are wasted work.
        text = text[:, : int((text != 0).any(0).sum())].to(images.device)
        text, others = text[: len(images)], text[len(images) :]
        negatives = others.unflatten(0, (len(images), -1)) if len(others) else None
        contrast = self.clip.contrast(text, images, text != 0, negatives, all_processes=True)
        accuracy = (contrast.by_image.argmax(1) == contrast.labels).float().mean()
        metrics = {"accuracy": accuracy, "scale": self.clip.temperature.detach().exp()}
        loss = contrast.loss()
        if self.read is not None:
            of_images = _of_both_pairs(batch, "attributes")
            told = _of_both_pairs(batch, "caption_attributes") or of_images
            wanted = torch.cat((*told, *of_images)).to(images.device)
            latents = torch.cat((contrast.text_latents, contrast.image_latents))
            loss_attributes = self.read.loss(latents, wanted) / (wanted != -100).sum().clamp(min=1)
            loss, metrics["loss_attributes"] = loss + loss_attributes, loss_attributes.detach()
        return loss, metrics

    def frozen_parts(self) -> list[nn.Module]:
        return [] if self.prior is None else [self.prior]

    def fixed_parts(self) -> dict[str, str]:
        parts = {"tokenizer": self.clip.tokenizer, "prior": self.prior}
        return {name: part.fingerprint() for name, part in parts.items() if part is not None}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"clip": self.clip}

    def compiled_parts(self) -> list[nn.Module]:
        return [self.clip.text_transformer, self.clip.visual_transformer, self.clip.patch_emb]

    def write_companions(self, folder: Path) -> None:
        if self.clip.tokenizer is not None:
            write_tokenizer(self.clip.tokenizer, folder)

    @torch.no_grad()
    def _redrawn(self, images: Tensor, captions: list[str]) -> Tensor:
        """The images (b, 3, h, h) in [0, 1], some of them redrawn by the prior."""
        if self.prior is None:
            return images
        chosen = (torch.rand(len(images)) < REDRAWN_SHARE).nonzero()[:, 0]
        if not len(chosen):
            return images
        text = self.prior.tokenize([captions[i] for i in chosen])
        chosen = chosen.to(images.device)
        tokens = self.prior.encode_image(images[chosen])
        logits = self.prior.next_token_logits(text, tokens).flatten(0, 1)
        temperature = float(torch.empty(()).uniform_(*TEMPERATURES))
        settings = SamplingSettings(top_k=REDRAWN_TOP_K, temperature=temperature)
        drawn = draw(logits, torch.rand(len(logits), device=logits.device), settings).view_as(tokens)
        redrawn = resize(self.prior.vae.decode_image(drawn), images.shape[-1])
        return images.index_copy(0, chosen, redrawn.to(images.dtype))

    def _augment(self, images: Tensor) -> Tensor:
        size = images.shape[-1]
        side = int(size * float(torch.empty(()).uniform_(self.smallest_crop, 1)))
        left, top = torch.randint(size - side + 1, (2,)).tolist()
        images = images[..., top : top + side, left : left + side]
        if torch.rand(()) < 0.5:
            images = F.interpolate(images, (size // 2, size // 2), mode="bilinear", antialias=True)
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear")
        spread = self.noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        return (images + spread * torch.randn_like(images)).clamp(0, 1)


def _of_both_pairs(batch: Batch, name: str) -> list[Any]:
    """What a batch has of the first pairs, and of the second ones; empty if it has none."""
    return [batch[each] for each in (name, f"second_{name}") if each in batch]
