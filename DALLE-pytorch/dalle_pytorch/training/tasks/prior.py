"""The training task of the prior: next-token loss over captions and image tokens."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.training.tasks.base import Batch, Loss, Preview, TrainingTask, write_tokenizer

PREVIEWS = 4  # captions of a batch in a preview


class DalleTask(TrainingTask):
    """The next-token loss of the prior over captions and the VAE's tokens of their images.

    `null_cond_prob` of the captions are dropped, for classifier-free guidance. Where the data have a `mask` of the
    subject, tokens under it weigh `subject_weight` times as much: a plain mean is dominated by texture, and learns
    little of the shape that the caption names. `image_noise` is `DALLE.forward`'s.

    A batch has the `tokens` (b, image_seq_len) of its images, or the images `image` (b, 3, h, h) uint8. The trained
    prior is the part `name`. Raises `UsageError` for a tokenizer with more tokens than the prior knows.
    """

    def __init__(self, dalle: DALLE, tokenizer: Tokenizer, null_cond_prob: float = 0.1, subject_weight: float = 1.0,
                 image_noise: float = 0.0, name: str = "dalle"):  # fmt: skip
        super().__init__()
        known = dalle.num_text_tokens - dalle.text_seq_len
        if tokenizer.vocab_size > known:
            raise UsageError(f"expected a tokenizer of at most {known} tokens, got {tokenizer.vocab_size}; this prior "
                             "needs the one that it was trained with (--bpe_path)")  # fmt: skip
        self.dalle, self.tokenizer, self.name = dalle, tokenizer, name
        self.null_cond_prob, self.subject_weight, self.image_noise = null_cond_prob, subject_weight, image_noise

    def forward(self, batch: Batch) -> Loss:
        image = batch["tokens"] if "tokens" in batch else self.dalle.encode_image(batch["image"].float() / 255)
        weights = None
        if self.subject_weight != 1 and "mask" in batch:
            covered = F.adaptive_max_pool2d(batch["mask"][:, None], self.dalle.image_fmap_size).flatten(1) > 0
            weights = 1 + (self.subject_weight - 1) * covered.float()
        text = self._text(batch["caption"], image.device)
        loss = self.dalle(text, image, return_loss=True, null_cond_prob=self.null_cond_prob, image_weights=weights,
                          image_noise=self.image_noise)  # fmt: skip
        return loss, {}

    def _text(self, captions: list[str], device: torch.device) -> Tensor:
        return self.tokenizer.tokenize(captions, self.dalle.text_seq_len, truncate_text=True).to(device)

    def fixed_parts(self) -> dict[str, str]:
        return {"VAE": self.dalle.vae.fingerprint(), "tokenizer": self.tokenizer.fingerprint()}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {self.name: self.dalle}

    def compiled_parts(self) -> list[nn.Module]:
        return [self.dalle]

    def write_companions(self, folder: Path) -> None:
        write_tokenizer(self.tokenizer, folder)

    def preview(self, batch: Batch) -> Preview:
        """Images sampled for the first captions of the batch, and those captions."""
        captions = batch["caption"][:PREVIEWS]
        images = self.dalle.generate_images(self._text(captions, self.dalle.device), top_p=0.9, seed=0)
        assert isinstance(images, Tensor)
        return {"drawn": images, "captions": "\n".join(captions)}
