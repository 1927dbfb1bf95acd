"""What the prior and CLIP are trained on: a batch of pictures and captions to a loss and the figures to log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.clip import CLIP
from dalle_pytorch.dalle import DALLE

if TYPE_CHECKING:
    from dalle_pytorch.tokenizers import HugTokenizer

Batch = dict[str, Any]
Loss = tuple[Tensor, dict[str, Tensor]]


class DalleTask(nn.Module):
    """The next-token loss of the prior over captions and the VAE's tokens of their pictures.

    `null_cond_prob` of the captions are dropped, so that the prior can be guided. Where the data says what part of each
    token's square the subject covers, tokens under the subject weigh `subject_weight` times as much: a plain mean is
    all texture, and hears little of the shape that the caption names.
    """

    def __init__(self, dalle: DALLE, tokenizer: HugTokenizer, null_cond_prob: float = 0.1, subject_weight: float = 1.0):
        super().__init__()
        self.dalle, self.tokenizer = dalle, tokenizer
        self.null_cond_prob, self.subject_weight = null_cond_prob, subject_weight

    def forward(self, batch: Batch) -> Loss:
        images = batch["image"].float() / 255
        text = self.tokenizer.tokenize(batch["caption"], self.dalle.text_seq_len, truncate_text=True).to(images.device)
        weights = None
        if self.subject_weight != 1 and "mask" in batch:
            weights = 1 + (self.subject_weight - 1) * (batch["mask"] > 0).flatten(1).float()
        loss = self.dalle(text, images, return_loss=True, null_cond_prob=self.null_cond_prob, image_weights=weights)
        return loss, {}


class ClipTask(nn.Module):
    """The contrastive loss of CLIP, with hard negatives (the caption with one fact wrong) where the data has them.

    Pictures are shifted, scaled, blurred and made noisy at random, a little: CLIP will judge sampled pictures, and
    guide on cutouts of half-denoised ones.
    """

    def __init__(self, clip: CLIP, smallest_crop: float = 0.8, noise: float = 0.06):
        super().__init__()
        self.clip, self.smallest_crop, self.noise = clip, smallest_crop, noise

    def forward(self, batch: Batch) -> Loss:
        images = self._augment(batch["image"].float() / 255)
        text = self.clip.tokenize(batch["caption"]).to(images.device)
        negatives = None
        if "other_caption" in batch:
            negatives = self.clip.tokenize(batch["other_caption"]).to(images.device)[:, None]
        loss = self.clip(text, images, text_mask=text != 0, return_loss=True, negatives=negatives)
        return loss, {"scale": self.clip.temperature.detach().exp()}

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
