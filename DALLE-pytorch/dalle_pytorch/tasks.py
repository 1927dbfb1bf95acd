"""What the prior and CLIP are trained on: a batch of pictures and captions to a loss and the figures to log."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.checkpoints import PretrainedModel
from dalle_pytorch.clip import CLIP
from dalle_pytorch.dalle import DALLE
from dalle_pytorch.tokenizers import Tokenizer

Batch = dict[str, Any]
Loss = tuple[Tensor, dict[str, Tensor]]

TOKENIZER_NAME = "tokenizer.json"
PREVIEWS = 4  # captions of a batch that the prior draws for a preview


class LongCaption:
    """Why a caption is not learned from: it has more than `length` tokens. None for one that has not."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, caption: str) -> str | None:
        too_long = len(self.tokenizer.encode(caption)) > self.length
        return f"caption of more than {self.length} tokens" if too_long else None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` into a model's folder, so that it travels with the weights.

    An encoding that such a file cannot hold is left out: CLIP's, which is taken where there is no file.
    """
    with suppress(ValueError):
        tokenizer.save(folder / TOKENIZER_NAME)


class DalleTask(nn.Module):
    """The next-token loss of the prior over captions and the VAE's tokens of their pictures.

    `null_cond_prob` of the captions are dropped, so that the prior can be guided. Where the data says what part of each
    token's square the subject covers, tokens under the subject weigh `subject_weight` times as much: a plain mean is
    all texture, and hears little of the shape that the caption names. `image_noise` is `DALLE.forward`'s.

    A batch has the tokens (b, image_seq_len) of its pictures, or the pictures (b, 3, h, h) uint8. The trained prior is
    the part `name`. Raises `ValueError` for a tokenizer with more tokens than the prior knows.
    """

    def __init__(
        self,
        dalle: DALLE,
        tokenizer: Tokenizer,
        null_cond_prob: float = 0.1,
        subject_weight: float = 1.0,
        image_noise: float = 0.0,
        name: str = "dalle",
    ):
        super().__init__()
        known = dalle.num_text_tokens - dalle.text_seq_len
        if tokenizer.vocab_size > known:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and this prior knows {known}; it wants the one that "
                "it was trained with (--bpe_path)"
            )
        self.dalle, self.tokenizer = dalle, tokenizer
        self.null_cond_prob, self.subject_weight, self.name = null_cond_prob, subject_weight, name
        self.image_noise = image_noise

    def forward(self, batch: Batch) -> Loss:
        image = batch["tokens"] if "tokens" in batch else batch["image"].float() / 255
        weights = None
        if self.subject_weight != 1 and "mask" in batch:
            covered = F.adaptive_max_pool2d(batch["mask"][:, None], self.dalle.image_fmap_size).flatten(1) > 0
            weights = 1 + (self.subject_weight - 1) * covered.float()
        loss = self.dalle(
            self._text(batch["caption"], image.device),
            image,
            return_loss=True,
            null_cond_prob=self.null_cond_prob,
            image_weights=weights,
            image_noise=self.image_noise,
        )
        return loss, {}

    def _text(self, captions: list[str], device: torch.device) -> Tensor:
        return self.tokenizer.tokenize(captions, self.dalle.text_seq_len, truncate_text=True).to(device)

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {self.name: self.dalle}

    def write_companions(self, folder: Path) -> None:
        write_tokenizer(self.tokenizer, folder)

    def preview(self, batch: Batch) -> dict[str, Tensor | str]:
        """Pictures drawn for the first captions of the batch, and those captions."""
        captions = batch["caption"][:PREVIEWS]
        pictures = self.dalle.generate_images(self._text(captions, self.dalle.device), top_p=0.9, seed=0)
        return {"drawn": pictures, "captions": "\n".join(captions)}


class ClipTask(nn.Module):
    """The contrastive loss of CLIP over the batch of all processes, with hard negatives where the data has them:
    captions with one fact wrong, as many for each picture, and twins, pictures with a caption that differ in one fact
    from another of the batch.

    Pictures are shifted, scaled, blurred and made noisy at random, a little: CLIP will judge sampled pictures, and
    guide on cutouts of half-denoised ones. `accuracy` is the share of the pictures whose caption is the likeliest of
    all that they are told apart from.
    """

    def __init__(self, clip: CLIP, smallest_crop: float = 0.8, noise: float = 0.06):
        super().__init__()
        self.clip, self.smallest_crop, self.noise = clip, smallest_crop, noise

    def forward(self, batch: Batch) -> Loss:
        images, captions, others = batch["image"], batch["caption"], batch.get("other_captions", [])
        if "twin_image" in batch:
            images = torch.cat((images, batch["twin_image"]))
            captions = captions + batch["twin_caption"]
            others = others + batch.get("twin_other_captions", [])
        images = self._augment(images.float() / 255)
        captions = captions + [caption for row in others for caption in row]
        text = self.clip.tokenize(captions)
        # What is padding in all of them is work for nothing.
        text = text[:, : int((text != 0).any(0).sum())].to(images.device)
        text, others = text[: len(images)], text[len(images) :]
        negatives = others.unflatten(0, (len(images), -1)) if len(others) else None
        by_text, by_image, partner = self.clip.contrast(text, images, text != 0, negatives, all_processes=True)
        loss = (F.cross_entropy(by_text, partner) + F.cross_entropy(by_image, partner)) / 2
        accuracy = (by_image.argmax(1) == partner).float().mean()
        return loss, {"accuracy": accuracy, "scale": self.clip.temperature.detach().exp()}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"clip": self.clip}

    def write_companions(self, folder: Path) -> None:
        write_tokenizer(self.clip.tokenizer, folder)

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
