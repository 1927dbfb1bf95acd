"""DALLE: the autoregressive prior over text tokens and image tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.nn.cache import TransformerCache
from dalle_pytorch.nn.linear import Linear
from dalle_pytorch.nn.transformer import Transformer
from dalle_pytorch.nn.upstream import TRANSFORMER_NAMES, State, is_upstream, rename, strip_prefix
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.loop import (
    evaluation,
    prefill,
    sample_image_tokens,
    sample_image_tokens_uncached,
    sample_text,
)
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.vae.base import ImageTokenizer

# DALLE-pytorch's parameter names, of releases 0.11 to 1.6 and of the DALL-3 fork.
UPSTREAM_NAMES = (
    *TRANSFORMER_NAMES, (r"^to_logits\.0\.", "norm."), (r"^to_logits\.1\.", "to_logits."),
    (r"^image_pos_emb\.weights[._]0$", "image_pos_emb.rows"),
    (r"^image_pos_emb\.weights[._]1$", "image_pos_emb.columns"),
)  # fmt: skip
# Tables that are computed, and second names of the output layer under share_input_output_emb.
UPSTREAM_DROPPED = re.compile(r"logits_mask$|transformer\.pos_emb$|(text|image)_emb\.linear\.|.*\.static_mask$")


class AxialPositions(nn.Module):
    """Learned positions of a square grid: one vector per row plus one per column."""

    def __init__(self, dim: int, side: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(side, 1, dim))
        self.columns = nn.Parameter(torch.randn(1, side, dim))

    def forward(self, start: int, stop: int) -> Tensor:
        """The vectors of positions `start` to `stop` of the grid, row by row: (stop - start, dim)."""
        return (self.rows + self.columns).flatten(0, 1)[start:stop]


class DALLE(Prior[TransformerCache]):
    """The transformer of DALL-E (arXiv:2102.12092), with the options and defaults of lucidrains' DALLE-pytorch.

    A sequence is <bos>, `text_seq_len` text tokens and the image tokens row by row. Padding (0) at each text position
    is a token of its own. A text position predicts text only and an image position image tokens only.

    Args:
        dim: width of the token stream.
        vae: the image tokenizer; it is frozen.
        num_text_tokens: size of the tokenizer's vocabulary.
        text_seq_len: text tokens in a sequence, padding included.
        depth, heads, dim_head, attn_dropout, ff_dropout, shared_attn_ids, shared_ff_ids: see `Transformer`.
        reversible: memory in training does not grow with depth (measured in docs/reversible.md).
        sparse_attn: layers (cycling) with block-sparse attention, as if `attn_types` had `sparse` there.
        attn_types: `full`, `axial_row`, `axial_col`, `conv_like`, `sparse`, cycling over the layers.
        loss_img_weight: weight of the image's loss; the text's is 1.
        stable: for half precision, scales the embeddings' gradient down and divides the output by its maximum
            (CogView, arXiv:2105.13290).
        sandwich_norm: a second norm at the end of each branch (CogView).
        shift_tokens: each token takes some channels of its neighbours, see `TokenShift`.
        rotary_emb: rotary positions; learned ones otherwise.
        share_input_output_emb: ties embeddings to the output layer.
        image_fmap_size, num_image_tokens: the VAE's unless given; the latter is checked against the VAE's.
        qk_norm: RMS norm on queries and keys. Not in DALLE-pytorch.
    """

    @records_config
    def __init__(
        self, *, dim: int, vae: ImageTokenizer, num_text_tokens: int = 10000, text_seq_len: int = 256, depth: int,
        heads: int = 8, dim_head: int = 64, reversible: bool = False, attn_dropout: float = 0.0,
        ff_dropout: float = 0.0, sparse_attn: bool | Sequence[bool] = False,
        attn_types: str | Sequence[str] | None = None, loss_img_weight: float = 7, stable: bool = False,
        sandwich_norm: bool = False, shift_tokens: bool = True, rotary_emb: bool = True,
        shared_attn_ids: Sequence[int] | None = None, shared_ff_ids: Sequence[int] | None = None,
        share_input_output_emb: bool = False, image_fmap_size: int | None = None, num_image_tokens: int | None = None,
        qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.set_vae(vae, image_fmap_size, num_image_tokens)
        self.text_seq_len = text_seq_len
        self.total_seq_len = self.max_length = text_seq_len + self.image_seq_len
        # As upstream, including the padding tokens, one for each text position.
        self.num_text_tokens = num_text_tokens + text_seq_len
        # DALLE-pytorch's `top_k` is a fraction of text and image tokens together.
        self.total_tokens = self.num_filtered_tokens = self.num_text_tokens + self.num_image_tokens
        self.loss_img_weight = loss_img_weight
        self.stable = stable

        self.transformer = Transformer(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, text_len=text_seq_len + 1,
            image_fmap_size=self.image_fmap_size, reversible=reversible, attn_dropout=attn_dropout,
            ff_dropout=ff_dropout, attn_types=_layer_types(attn_types, sparse_attn, depth), sandwich_norm=sandwich_norm,
            shift_tokens=shift_tokens, rotary_emb=rotary_emb, shared_attn_ids=shared_attn_ids,
            shared_ff_ids=shared_ff_ids, qk_norm=qk_norm,
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        self.to_logits = Linear(dim, self.total_tokens)
        self.text_emb = None if share_input_output_emb else nn.Embedding(self.num_text_tokens, dim)
        self.image_emb = None if share_input_output_emb else nn.Embedding(self.num_image_tokens, dim)
        self.text_pos_emb = None if rotary_emb else nn.Embedding(text_seq_len + 1, dim)
        self.image_pos_emb = None if rotary_emb else AxialPositions(dim, self.image_fmap_size)

    # Checkpoints

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Also takes DALLE-pytorch's names, as in `torch.load("dalle.pt")["weights"]`.

        Without weights of a VAE in these, the VAE stays as it is.
        """
        if is_upstream(state_dict):
            vae = self.vae.rename_upstream(strip_prefix(state_dict, "vae.")) or self.vae.state_dict()
            state_dict = self.from_upstream(state_dict) | {f"vae.{key}": tensor for key, tensor in vae.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def from_upstream(self, weights: Mapping[str, Tensor]) -> State:
        """The prior's own weights, without those of its VAE, from DALLE-pytorch's names.

        Upstream does not save the random blocks of `sparse` layers: these stay as they are. Raises `ValueError` for
        rotary positions other than those of release 1.x.
        """
        kept = (key for key in weights if not (key.startswith("vae.") or UPSTREAM_DROPPED.match(key)))
        state = rename({key: weights[key] for key in kept}, UPSTREAM_NAMES)
        for key in ("image_pos_emb.rows", "image_pos_emb.columns"):
            if key in state:
                state[key] = state[key].squeeze(0)
        if self.transformer.rotary is not None and "transformer.pos_emb" in weights:
            # Each angle is there twice, for the two channels that it rotates.
            angles = weights["transformer.pos_emb"].float().flatten(0, -2)[:, ::2]
            recorded = torch.stack((angles.cos(), angles.sin()), dim=-1)
            computed = self.transformer.rotary[: len(angles), : angles.shape[1]].to(recorded)
            if recorded.shape != computed.shape or (recorded - computed).abs().max() > 0.01:
                raise ValueError("rotary positions of an unsupported kind")
        layouts = {key: tensor for key, tensor in self.state_dict().items() if key.endswith("pattern.layout")}
        return layouts | state

    # Embeddings

    def prepare_text(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prepends <bos> to text (b, text_seq_len) and replaces padding (0) by the token of its position.

        Positions where `mask` (b, text_seq_len) is false become padding.
        """
        if text.ndim != 2 or text.shape[1] != self.text_seq_len:
            raise ValueError(f"expected text of shape (batch, {self.text_seq_len}), got {tuple(text.shape)}")
        if mask is not None:
            text = text.masked_fill(~mask.bool(), 0)
        padding = torch.arange(self.num_text_tokens - self.text_seq_len, self.num_text_tokens, device=text.device)
        return F.pad(torch.where(text == 0, padding, text), (1, 0))

    def check_text(self, text: Tensor) -> None:
        self.check_vocabulary(text, self.num_text_tokens - self.text_seq_len)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (b, n, dim) of the first n tokens of `prepare_text`'s."""
        emb = self.to_logits.rows(tokens) if self.text_emb is None else self.text_emb(tokens)
        return emb if self.text_pos_emb is None else emb + self.text_pos_emb.weight[: tokens.shape[1]]

    def embed_image(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embeddings (b, n, dim) of image tokens (b, n), the first of which is at position `start` of the grid."""
        emb = self.to_logits.rows(tokens + self.num_text_tokens) if self.image_emb is None else self.image_emb(tokens)
        return emb if self.image_pos_emb is None else emb + self.image_pos_emb(start, start + tokens.shape[1])

    # Forward

    def hidden(self, emb: Tensor, cache: TransformerCache | None = None) -> Tensor:
        """The transformer and the last norm over embeddings (b, n, dim), which continue `cache` if given."""
        if self.stable:
            emb = emb * 0.1 + emb.detach() * 0.9
        out = self.transformer(emb, cache=cache)
        if self.stable:
            out = out / out.amax(dim=-1, keepdim=True).detach()
        return self.norm(out)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the text tokens, (..., num_text_tokens), from (..., dim)."""
        return self.to_logits.outputs(hidden, stop=self.num_text_tokens)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the image tokens, (..., num_image_tokens), from (..., dim)."""
        return self.to_logits.outputs(hidden, self.num_text_tokens)

    def forward(
        self, text: Tensor, image: Tensor | None = None, return_loss: bool = False, null_cond_prob: float = 0.0,
        mask: Tensor | None = None, image_weights: Tensor | None = None, image_noise: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """The training loss, or the logits of each next token.

        Args:
            text: (b, text_seq_len) int64, 0 for padding.
            image: pixels (b, 3, h, w) in [0, 1], or the first tokens of the grid, (b, n) int64.
            return_loss: the mean of the text's cross-entropy and the image's, the latter with weight `loss_img_weight`.
            null_cond_prob: share of texts replaced by padding, for classifier-free guidance (arXiv:2207.12598).
            mask: (b, text_seq_len) bool; text where it is false becomes padding.
            image_weights: (b, image_seq_len) weights of the image tokens in the loss, a weighted mean over the batch.
            image_noise: upper bound of the share of input tokens that each image has replaced by those of another image
                of the batch; targets stay. Makes sampling robust to wrong tokens.

        Returns:
            A scalar loss; or logits (b, text_seq_len + 1 + n, total_tokens), one position less for a whole image, in
            which the tokens that a position cannot predict have the least finite value.
        """
        if null_cond_prob > 0:
            dropped = torch.rand(len(text), 1, device=text.device) < null_cond_prob
            text = text.masked_fill(dropped, 0)
        text = self.prepare_text(text, mask)
        emb = self.embed_text(text)
        if image is not None and image.numel() > 0:
            image = self.encode_image(image)
            if image.shape[1] > self.image_seq_len:
                raise ValueError(f"expected at most {self.image_seq_len} image tokens, got {image.shape[1]}")
            shown = image
            if image_noise > 0:
                share = image_noise * torch.rand(len(image), 1, device=image.device)
                shown = torch.where(torch.rand(image.shape, device=image.device) < share, image.roll(1, 0), image)
            emb = torch.cat((emb, self.embed_image(shown)), dim=1)
        # Nothing follows the last image token.
        hidden = self.hidden(emb[:, : self.total_seq_len])
        on_text, on_image = hidden[:, : self.text_seq_len], hidden[:, self.text_seq_len :]

        if not return_loss:
            lowest = torch.finfo(hidden.dtype).min
            text_logits = F.pad(self.text_logits(on_text), (0, self.num_image_tokens), value=lowest)
            image_logits = F.pad(self.image_logits(on_image), (self.num_text_tokens, 0), value=lowest)
            return torch.cat((text_logits, image_logits), dim=1)

        if image is None or image.shape[1] != self.image_seq_len:
            raise ValueError(f"the loss needs the whole image: {self.image_seq_len} tokens, or pixels")
        loss_text = F.cross_entropy(self.text_logits(on_text).flatten(0, 1), text[:, 1:].flatten())
        image_logits = self.image_logits(on_image).flatten(0, 1)
        if image_weights is None:
            loss_image = F.cross_entropy(image_logits, image.flatten())
        else:
            losses = F.cross_entropy(image_logits, image.flatten(), reduction="none")
            loss_image = (losses * image_weights.flatten()).sum() / image_weights.sum()
        return (loss_text + self.loss_img_weight * loss_image) / (1 + self.loss_img_weight)

    # For sampling

    def next_token_logits(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        emb = torch.cat((self.embed_text(self.prepare_text(text)), self.embed_image(image_tokens)), dim=1)
        hidden = self.hidden(emb[:, : self.total_seq_len])
        return _at_least_float32(self.image_logits(hidden[:, self.text_seq_len :]))

    def prefill(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, TransformerCache]:
        emb = torch.cat((self.embed_text(self.prepare_text(text)), self.embed_image(image_tokens)), dim=1)
        cache = self.transformer.make_cache(len(text), emb.shape[1], emb.device, emb.dtype)
        return _at_least_float32(self.image_logits(self.hidden(emb, cache)[:, -1])), cache

    def step(self, tokens: Tensor, position: int, cache: TransformerCache) -> Tensor:
        hidden = self.hidden(self.embed_image(tokens[:, None], start=position), cache)
        return _at_least_float32(self.image_logits(hidden[:, 0]))

    def unconditional_text(self, text: Tensor) -> Tensor:
        return torch.zeros_like(text)

    # DALLE-pytorch's calls

    def generate_images(
        self, text: Tensor, *, clip: nn.Module | None = None, mask: Tensor | None = None, filter_thres: float = 0.5,
        top_k: float | None = None, top_p: float | None = None, top_k_thresh: float | None = None,
        top_p_thresh: float | None = None, temperature: float = 1.0, cond_scale: float = 1.0, img: Tensor | None = None,
        num_init_img_tokens: int | None = None, use_cache: bool = True, return_tokens: bool = False,
        seed: int | None = None, on_token: Callable[[], object] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        """Samples one image for each text.

        Args:
            text: (b, n) int64, 0 for padding; truncated to `text_seq_len`.
            clip: a trainable `CLIP` whose scores are returned too.
            mask: (b, n) bool; text where it is false becomes padding.
            filter_thres: fraction of all tokens to remove, unless `top_k` or `top_p` is given.
            top_k, top_p, temperature, cond_scale: see `SamplingSettings`; `top_k_thresh` and `top_p_thresh` are other
                names for the first two.
            img: images (b, 3, h, h) in [0, 1] (or one for all) to complete from their first `num_init_img_tokens`
                tokens, 7/16 of them by default.
            use_cache: False runs the whole sequence for every token, with the same result.
            return_tokens: returns the image tokens (b, image_seq_len) too.
            seed: determines the samples; from torch's global generator by default.
            on_token: called after each token of the batch.

        Returns:
            Images (b, 3, h, w) in [0, 1]; or a tuple of them, the scores (b,) with `clip` and the tokens with
            `return_tokens`. Raises `UsageError` for settings out of range.
        """
        top_p = top_p_thresh if top_p is None else top_p
        top_k = top_k_thresh if top_k is None else top_k
        top_k = filter_thres if top_k is None and top_p is None else top_k
        settings = SamplingSettings(top_k, top_p, temperature, cond_scale)
        text = text[:, : self.text_seq_len]
        self.check_text(text)
        if mask is not None:
            text = text.masked_fill(~mask[:, : self.text_seq_len].bool(), 0)
        with evaluation(self):
            init_image_tokens = text.new_empty(len(text), 0)
            if img is not None:
                count = self.num_init_tokens(num_init_img_tokens)
                init_image_tokens = self.encode_image(img)[:, :count].expand(len(text), -1)
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            uniforms = torch.cat([candidate_uniforms(seed, row, [i], self.image_seq_len) for i, row in enumerate(text)])
            if use_cache:
                # Equal prompts go through the transformer once.
                prompts, rows = torch.cat((text, init_image_tokens), dim=1).unique(dim=0, return_inverse=True)
                prompt_text, prompt_init = prompts.split((text.shape[1], init_image_tokens.shape[1]), dim=1)
                prefix = prefill(self, prompt_text, prompt_init, cond_scale)
                tokens = sample_image_tokens(self, prefix, rows, uniforms, settings, on_token)
            else:
                tokens = sample_image_tokens_uncached(self, text, init_image_tokens, uniforms, settings, on_token)
            images = self.vae.decode_image(tokens)
            scores = () if clip is None else (clip(text, images, return_loss=False),)
        results = (images, *scores, *((tokens,) if return_tokens else ()))
        return images if len(results) == 1 else results

    def generate_texts(
        self, tokenizer: Tokenizer, text: str | None = None, *, filter_thres: float = 0.5, top_k: float | None = None,
        top_p: float | None = None, temperature: float = 1.0, seed: int | None = None,
    ) -> tuple[Tensor, list[str]]:  # fmt: skip
        """Continues `text`, or samples one: tokens (1, text_seq_len), and the text in a list. `filter_thres` as in
        `generate_images`."""
        top_k = filter_thres if top_k is None and top_p is None else top_k
        settings = SamplingSettings(top_k, top_p, temperature)
        begin = torch.tensor([tokenizer.encode(text) if text else []], dtype=torch.long, device=self.device)
        tokens = sample_text(
            self, begin, lambda tokens: self.text_logits(self.hidden(self.embed_text(F.pad(tokens, (1, 0))))[:, -1]),
            settings, seed,
        )  # fmt: skip
        first_padding = self.num_text_tokens - self.text_seq_len
        tokens = tokens.masked_fill(tokens >= first_padding, 0)
        return tokens, [tokenizer.decode([token for token in row if token != 0]) for row in tokens.tolist()]


def _at_least_float32(logits: Tensor) -> Tensor:
    """Guidance multiplies small differences."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _layer_types(attn_types: str | Sequence[str] | None, sparse_attn: bool | Sequence[bool], depth: int) -> list[str]:
    """One attention type per layer."""
    types = cycle([attn_types] if isinstance(attn_types, str) else attn_types or ("full",))
    sparse = cycle([sparse_attn] if isinstance(sparse_attn, bool) else sparse_attn or (False,))
    layers = zip(range(depth), types, sparse, strict=False)
    return ["sparse" if is_sparse else attn_type for _, attn_type, is_sparse in layers]
