"""The trainable CLIP: two small transformers, for text tokens and for image patches."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.images import resize
from dalle_pytorch.nn.attention_weights import DotProductAttention
from dalle_pytorch.nn.transformer import Transformer
from dalle_pytorch.nn.upstream import TRANSFORMER_NAMES, is_upstream, rename
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.hug import companion_tokenizer
from dalle_pytorch.tokenizers.simple import SimpleTokenizer

OPENAI_VOCABULARY = 49408  # text tokens of `SimpleTokenizer`

# DALLE-pytorch's parameter names.
UPSTREAM_NAMES = (
    *TRANSFORMER_NAMES, (r"^to_visual_embedding\.", "patch_emb."), (r"^visual_pos_emb\.", "patch_pos_emb."),
)  # fmt: skip


def convolutional_stem(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """Patch embedding by 3×3 convolutions of stride 2 (arXiv:2106.14881): images to (b, dim, h / p, w / p)."""
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or not halvings:
        raise UsageError(f"visual_conv_stem needs a visual_patch_size of 2, 4, 8, … pixels, got {patch_size}")
    widths = [channels, *(max(dim >> left, 8) for left in reversed(range(halvings)))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))


class AttentionPool(DotProductAttention):
    """Attention pooling of tokens (b, n, dim) by a learned query in each head: (b, dim).

    The pooling of arXiv:2106.04560 without its feed-forward part. Unlike a mean, it does not dilute small subjects.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise UsageError(f"dim_image must be a multiple of {heads} pooling heads, got {dim}")
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(heads, 1, dim // heads))
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, _, width = self.query.shape
        k, v = self.to_kv(self.norm(x)).unflatten(2, (2, heads, width)).permute(2, 0, 3, 1, 4)
        return self.attend(self.query.expand(len(x), -1, -1, -1), k, v).flatten(1)


class Contrast(NamedTuple):
    """Texts compared with images."""

    by_text: Tensor  # (b, B), the logits of each text over the images
    by_image: Tensor  # (b, B + k), those of each image over the texts
    labels: Tensor  # (b,), which of them belong together
    text_latents: Tensor  # (b, dim_latent), normalised
    image_latents: Tensor  # (b, dim_latent), normalised

    def loss(self) -> Tensor:
        """The symmetric contrastive loss (arXiv:2103.00020)."""
        return (F.cross_entropy(self.by_text, self.labels) + F.cross_entropy(self.by_image, self.labels)) / 2


class CLIP(CLIPModel):
    """CLIP (arXiv:2103.00020) as in DALLE-pytorch: mean-pooled transformers over text tokens and image patches.

    `visual_patch_dropout` is the share of patches dropped in training (FLIP, arXiv:2212.00794). `visual_conv_stem`
    embeds patches by `convolutional_stem` instead of a linear map, and `visual_attention_pool` pools them by
    `AttentionPool` instead of the mean; with both, training needs far fewer steps.
    """

    @records_config
    def __init__(
        self, *, dim_text: int = 512, dim_image: int = 512, dim_latent: int = 512, num_text_tokens: int = 10000,
        text_enc_depth: int = 6, text_seq_len: int = 256, text_heads: int = 8, num_visual_tokens: int = 512,
        visual_enc_depth: int = 6, visual_heads: int = 8, visual_image_size: int = 256, visual_patch_size: int = 32,
        visual_patch_dropout: float = 0.0, visual_conv_stem: bool = False, visual_attention_pool: bool = False,
        channels: int = 3, text_dim_head: int = 64, visual_dim_head: int = 64,
    ):  # fmt: skip
        super().__init__()
        if visual_image_size % visual_patch_size:
            raise UsageError(
                f"visual_image_size {visual_image_size} is not a multiple of visual_patch_size {visual_patch_size}"
            )
        self.dim_latent = dim_latent
        self.image_size = visual_image_size
        self.patch_size = visual_patch_size
        self.patch_dropout = visual_patch_dropout
        self.text_seq_len = text_seq_len
        self.tokenizer: Tokenizer | None = None

        self.text_emb = nn.Embedding(num_text_tokens, dim_text)
        self.text_pos_emb = nn.Embedding(text_seq_len, dim_text)
        self.text_transformer = Transformer(
            dim=dim_text, depth=text_enc_depth, heads=text_heads, dim_head=text_dim_head, causal=False
        )
        self.to_text_latent = nn.Linear(dim_text, dim_latent, bias=False)

        if visual_conv_stem:
            self.patch_emb = convolutional_stem(channels, dim_image, visual_patch_size)
        else:
            self.patch_emb = nn.Linear(channels * visual_patch_size**2, dim_image)
        self.patch_pos_emb = nn.Embedding((visual_image_size // visual_patch_size) ** 2, dim_image)
        self.visual_transformer = Transformer(
            dim=dim_image, depth=visual_enc_depth, heads=visual_heads, dim_head=visual_dim_head, causal=False
        )
        self.visual_pool = AttentionPool(dim_image, 2 * visual_heads) if visual_attention_pool else None
        self.to_visual_latent = nn.Linear(dim_image, dim_latent, bias=False)
        # Logarithm of the scale of similarities.
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Also takes DALLE-pytorch's names, as in `torch.load("clip.pt")["weights"]`."""
        if is_upstream(state_dict):
            state_dict = rename(state_dict, UPSTREAM_NAMES)
        return super().load_state_dict(state_dict, strict, assign)

    def opened(self, folder: Path) -> None:
        self.tokenizer = companion_tokenizer(folder)

    # Features

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Features (b, dim_latent), not normalised, of tokens (b, n), n ≤ text_seq_len.

        `text_mask` (b, n) is false at padding, by default where the token is 0.
        """
        text_mask = text != 0 if text_mask is None else text_mask.bool()
        # An empty text attends to its padding.
        return self._text_features(text, text_mask | ~text_mask.any(dim=1, keepdim=True))

    def _text_features(self, text: Tensor, text_mask: Tensor | None) -> Tensor:
        if text.shape[1] > self.text_seq_len:
            raise ValueError(f"expected at most {self.text_seq_len} text tokens, got {text.shape[1]}")
        emb = self.text_emb(text) + self.text_pos_emb.weight[: text.shape[1]]
        out = self.text_transformer(emb, key_mask=text_mask)
        if text_mask is None:
            return self.to_text_latent(out.mean(dim=1))
        kept = text_mask[:, :, None].to(out.dtype)
        return self.to_text_latent((out * kept).sum(dim=1) / kept.sum(dim=1))

    def encode_image(self, image: Tensor) -> Tensor:
        emb = self._embed_patches(resize(image, self.image_size)) + self.patch_pos_emb.weight
        if self.training and self.patch_dropout > 0:
            kept = max(round(emb.shape[1] * (1 - self.patch_dropout)), 1)
            chosen = torch.rand(emb.shape[:2], device=emb.device).topk(kept, dim=1).indices
            emb = emb.gather(1, chosen[:, :, None].expand(-1, -1, emb.shape[2]))
        patches = self.visual_transformer(emb)
        return self.to_visual_latent(patches.mean(dim=1) if self.visual_pool is None else self.visual_pool(patches))

    def _embed_patches(self, image: Tensor) -> Tensor:
        if not isinstance(self.patch_emb, nn.Linear):
            return self.patch_emb(image).flatten(2).transpose(1, 2)
        patches = F.pixel_unshuffle(image, self.patch_size)
        # DALLE-pytorch's order within a patch: row, column, channel.
        patches = patches.unflatten(1, (image.shape[1], -1)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
        return self.patch_emb(patches)

    # Training

    def forward(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None = None, return_loss: bool = False,
        negatives: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (b,) of the pairs, cosine times the learned scale; with `return_loss`, the symmetric contrastive loss:
        the mean cross-entropy of each image over the batch's texts and of each text over its images.

        `text` are tokens (b, n), `image` images (b, 3, h, w) in [0, 1]; for the rest see `contrast`.
        """
        if return_loss:
            return self.contrast(text, image, text_mask, negatives).loss()
        text_latents = F.normalize(self._text_features(text, text_mask), dim=-1)
        image_latents = F.normalize(self.encode_image(image), dim=-1)
        return (text_latents * image_latents).sum(dim=-1) * self.temperature.exp()

    def contrast(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None = None, negatives: Tensor | None = None,
        all_processes: bool = False,
    ) -> Contrast:  # fmt: skip
        """Compares texts with images, for the contrastive loss.

        Args:
            text: tokens (b, n).
            image: images (b, 3, h, w) in [0, 1].
            text_mask: (b, n), false at padding; by default padding counts as text, as upstream.
            negatives: (b, k, n) additional texts that do not match the image; masked at zeros if `text_mask` is given.
            all_processes: B is the batch of all processes, which are equally large, and b otherwise. The mean of the
                processes' losses, and of their gradients, is then that of one process with the whole batch.
        """
        text_latents = F.normalize(self._text_features(text, text_mask), dim=-1)
        image_latents = F.normalize(self.encode_image(image), dim=-1)
        scale = self.temperature.exp()
        texts, images, first = text_latents, image_latents, 0
        if all_processes and torch.distributed.is_initialized():
            from torch.distributed.nn.functional import all_gather

            texts, images = (torch.cat(all_gather(latents)) for latents in (text_latents, image_latents))
            first = torch.distributed.get_rank() * len(text)
        by_text = text_latents @ images.T * scale
        by_image = image_latents @ texts.T * scale
        if negatives is not None:
            flat = negatives.flatten(0, 1)
            latents = F.normalize(self._text_features(flat, None if text_mask is None else flat != 0), dim=-1)
            others = (latents.unflatten(0, negatives.shape[:2]) * image_latents[:, None]).sum(dim=-1) * scale
            by_image = torch.cat((by_image, others), dim=1)
        labels = first + torch.arange(len(text), device=text.device)
        return Contrast(by_text, by_image, labels, text_latents, image_latents)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (b, text_seq_len) of one text or several, truncated. Raises `CheckpointError` without a tokenizer."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._given_tokenizer().tokenize(texts, self.text_seq_len, truncate_text=True)

    def lost_text(self, text: str) -> str:
        return self._given_tokenizer().lost_text(text, self.text_seq_len)

    def _given_tokenizer(self) -> Tokenizer:
        """The tokenizer; OpenAI's by default for a CLIP of 49,408 text tokens."""
        if self.tokenizer is None and self.text_emb.num_embeddings == OPENAI_VOCABULARY:
            self.tokenizer = SimpleTokenizer()
        if self.tokenizer is None:
            raise CheckpointError("this CLIP has no tokenizer.json in its folder or beside it; set its `tokenizer`")
        return self.tokenizer

    def visual_features(self, image: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        hooks = [
            layer.ff.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
            for layer in self.visual_transformer.layers
        ]
        try:
            self.encode_image(image)
        finally:
            for hook in hooks:
                hook.remove()
        return [F.normalize(layer.float(), dim=-1) for layer in features]
