"""The training task of the prior: next-token loss over captions and image tokens."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.training.tasks.base import Batch, Loss, Preview, SharedRows, TrainingTask, write_tokenizer

PREVIEWS = 4  # captions of a batch in a preview


class DalleTask(TrainingTask):
    """The next-token loss of the prior over captions and the VAE's tokens of their images.

    `null_cond_prob` of the captions are dropped, for classifier-free guidance. Where the data have a `mask` of the
    subject, tokens under it weigh `subject_weight` times as much: a plain mean is dominated by texture, and learns
    little of the shape that the caption names. `image_noise` is `DALLE.forward`'s. With `share_codes` what is learned
    of an image token is learned, in part, of all whose codes are like its own: rare ones learn from frequent ones.

    A batch has the `tokens` (b, image_seq_len) of its images, or the images `image` (b, 3, h, h) uint8. The trained
    prior is the part `name`. Raises `UsageError` for a tokenizer with more tokens than the prior knows.
    """

    def __init__(self, dalle: DALLE, tokenizer: Tokenizer, null_cond_prob: float = 0.1, subject_weight: float = 1.0,
                 image_noise: float = 0.0, share_codes: bool = False, name: str = "dalle"):  # fmt: skip
        super().__init__()
        known = dalle.num_text_tokens - dalle.text_seq_len
        if tokenizer.vocab_size > known:
            raise UsageError(f"expected a tokenizer of at most {known} tokens, got {tokenizer.vocab_size}; this prior "
                             "needs the one that it was trained with (--bpe_path)")  # fmt: skip
        self.dalle, self.tokenizer, self.name = dalle, tokenizer, name
        self.null_cond_prob, self.subject_weight, self.image_noise = null_cond_prob, subject_weight, image_noise
        self.share_codes = share_codes

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

    def shared_rows(self) -> list[SharedRows]:
        if not self.share_codes:
            return []
        features = code_features(self.dalle.vae.codebook_weight.detach().float().cpu())
        tables = self.dalle.to_logits, self.dalle.image_emb
        return [SharedRows(table.weight, features) for table in tables if table is not None]

    def write_companions(self, folder: Path) -> None:
        write_tokenizer(self.tokenizer, folder)

    def preview(self, batch: Batch) -> Preview:
        """Images sampled for the first captions of the batch, and those captions."""
        captions = batch["caption"][:PREVIEWS]
        images = self.dalle.generate_images(self._text(captions, self.dalle.device), top_p=0.9, seed=0)
        assert isinstance(images, Tensor)
        return {"drawn": images, "captions": "\n".join(captions)}


def code_features(codes: Tensor, count: int = 256) -> Tensor:
    """Features (n, count + d) of codes (n, d), alike for codes that are alike: random Fourier features of a Gaussian
    kernel (Rahimi and Recht 2007) as wide as codes have neighbours, and the codes themselves."""
    codes = (codes - codes.mean(0)) / codes.std().clamp(min=1e-12)
    near = torch.cdist(codes[:512], codes).topk(min(9, len(codes)), largest=False).values[:, -1].median()
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(codes.shape[1], count, generator=generator) / (1.5 * near).clamp(min=1e-12)
    phases = 2 * math.pi * torch.rand(count, generator=generator)
    kernel = math.sqrt(2 / count) * torch.cos(codes @ waves + phases)
    return torch.cat([kernel - kernel.mean(0), codes / codes.shape[1]], dim=1)
