"""DalleBart: the encoder-decoder prior of DALL·E mini and mega, which min-dalle published for PyTorch.

    text (b, 64) ─TextEncoder─▶ states (b, 64, dim) ─▶ keys and values of each decoder layer, once a prompt
    <start>, image tokens ─ImageDecoder: self-attention, attention to the text, gated unit─▶ logits

Parameters have the names of the published files. No layer but the norms has a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.devices import release_memory
from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.cache import KVCache, TransformerCache, plain_cache
from dalle_pytorch.nn.cross_attention import CrossAttention
from dalle_pytorch.nn.linear import Linear
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.min_dalle import BEGIN, END, PAD, MinDalleTokenizer
from dalle_pytorch.vae.base import ImageTokenizer

PYPI = "pypi"


class GatedUnit(nn.Module):
    """The feed-forward part of NormFormer's kind: norms before the projections and after the gate."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(dim), nn.LayerNorm(ff_dim)
        self.fc0, self.fc1 = (nn.Linear(dim, ff_dim, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln0(x)
        return self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ff_dim: int):
        super().__init__()
        self.pre_self_attn_layer_norm, self.self_attn_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = CrossAttention(dim, heads)
        self.glu = GatedUnit(dim, ff_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(b, n, dim) → (b, n, dim); `mask` (b, 1, 1, n) is false at padding."""
        h = self.pre_self_attn_layer_norm(x)
        x = x + self.self_attn_layer_norm(self.self_attn(h, *self.self_attn.keys_and_values(h), mask))
        return x + self.glu(x)


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ff_dim: int):
        super().__init__()
        self.pre_self_attn_layer_norm, self.self_attn_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = CrossAttention(dim, heads)
        self.pre_encoder_attn_layer_norm, self.encoder_attn_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.encoder_attn = CrossAttention(dim, heads)
        self.glu = GatedUnit(dim, ff_dim)

    def forward(self, x: Tensor, own: KVCache, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """(b, n, dim) → (b, n, dim), a sequence from its start or one token that continues the cache `own`; `text`
        and `mask` are the prompts' keys and values, and their padding."""
        h = self.pre_self_attn_layer_norm(x)
        keys, values = own.update(*self.self_attn.keys_and_values(h))
        h = self.self_attn(h, keys, values, is_causal=x.shape[1] > 1, prompts=own.prompts)
        x = x + self.self_attn_layer_norm(h)
        h = self.pre_encoder_attn_layer_norm(x)
        x = x + self.encoder_attn_layer_norm(self.encoder_attn(h, *text, mask))
        return x + self.glu(x)


class TextEncoder(nn.Module):
    layers: Sequence[EncoderLayer]

    def __init__(self, num_tokens: int, length: int, dim: int, depth: int, heads: int, ff_dim: int):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(num_tokens, dim), nn.Embedding(length, dim)
        self.add_module("layers", nn.ModuleList(EncoderLayer(dim, heads, ff_dim) for _ in range(depth)))
        self.layernorm_embedding, self.final_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> Tensor:
        """States (b, n, dim) of text tokens (b, n); padding is not attended to."""
        mask = (text != PAD)[:, None, None]
        x = self.layernorm_embedding(self.embed_tokens(text) + self.embed_positions.weight)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_ln(x)


class ImageDecoder(nn.Module):
    layers: Sequence[DecoderLayer]

    def __init__(self, num_tokens: int, length: int, dim: int, depth: int, heads: int, ff_dim: int):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(num_tokens, dim), nn.Embedding(length, dim)
        self.add_module("layers", nn.ModuleList(DecoderLayer(dim, heads, ff_dim) for _ in range(depth)))
        self.layernorm_embedding, self.final_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.lm_head = Linear(dim, num_tokens, bias=False)

    def forward(self, tokens: Tensor, cache: DalleBartCache) -> Tensor:
        """The last hidden states (b, n, dim) of tokens (b, n) that continue the cache."""
        start = cache.image.length
        x = self.embed_tokens(tokens) + self.embed_positions.weight[start : start + tokens.shape[1]]
        x = self.layernorm_embedding(x)
        for layer, own, text in zip(self.layers, cache.image.layers, cache.text, strict=True):
            x = layer(x, own.kv, text, cache.mask)
        return self.final_ln(x)


class DalleBartCache:
    """Keys and values of the image tokens so far, and of the prompts: one set for all candidates of a prompt."""

    def __init__(self, image: TransformerCache, text: Sequence[tuple[Tensor, Tensor]], mask: Tensor):
        self.image, self.text, self.mask = image, text, mask

    def gather(self, rows: Tensor, max_length: int, share: bool = True) -> DalleBartCache:
        of_prompt = rows // (len(self.image.layers[0].kv.keys) // len(self.mask))
        groups, counts = of_prompt.unique_consecutive(return_counts=True)
        if len(counts.unique()) > 1:
            groups = of_prompt  # so many candidates here and so many there: a set for each of them
        text = [(keys[groups], values[groups]) for keys, values in self.text]
        return DalleBartCache(self.image.gather(rows, max_length, share), text, self.mask[groups])


class DalleBart(Prior[DalleBartCache]):
    """DALL·E mini's prior: BART (arXiv:1910.13461) from text tokens to image tokens.

    Args:
        dim, heads: width of both halves, and their attention heads.
        encoder_depth, encoder_ff_dim, decoder_depth, decoder_ff_dim: layers, and width of their gated units.
        num_text_tokens, text_seq_len: the text's vocabulary, and its length, padding (1) included.
        image_vocab_size: rows of the image embedding. The codes come first; after them are the start token and, in
            mega, rows without a use. None of these is ever drawn.
        start_token: the token that image tokens begin with, the number of codes by default, as in the published
            settings; "pypi" for the last code, one less, with which min-dalle's release on PyPI begins.
        image_fmap_size, num_image_tokens: checked against the VAE's where given.
    """

    tokenizer_type = MinDalleTokenizer
    sampling = SamplingSettings(top_k=256, cond_scale=16)
    #: reads the text encoder's weights again, which are then held for a prompt's pass alone; None holds them for good
    reopen_encoder: Callable[[], Mapping[str, Tensor]] | None = None

    @records_config
    def __init__(
        self, *, vae: ImageTokenizer, dim: int, heads: int, encoder_depth: int, encoder_ff_dim: int,
        decoder_depth: int, decoder_ff_dim: int, num_text_tokens: int, image_vocab_size: int, text_seq_len: int = 64,
        start_token: int | str | None = None, image_fmap_size: int = 16, num_image_tokens: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.set_vae(vae, image_fmap_size, num_image_tokens)
        self.text_seq_len, self.num_text_tokens = text_seq_len, num_text_tokens
        self.max_length = self.image_seq_len
        names = {None: self.num_image_tokens, PYPI: self.num_image_tokens - 1}
        self.start_token = start_token if isinstance(start_token, int) else names[start_token]
        if self.num_image_tokens > image_vocab_size or not 0 <= self.start_token < image_vocab_size:
            raise UsageError(f"expected at most {image_vocab_size} codes and a start token below that, got "
                             f"{self.num_image_tokens} and {self.start_token}")  # fmt: skip
        # First, as `device` is that of the first parameter: the encoder's weights come and go.
        self.decoder = ImageDecoder(image_vocab_size, self.image_seq_len, dim, decoder_depth, heads, decoder_ff_dim)
        self.encoder = TextEncoder(num_text_tokens, text_seq_len, dim, encoder_depth, heads, encoder_ff_dim)

    def step_parts(self) -> list[nn.Module]:
        return [self.decoder]

    def own_state_dict(self) -> dict[str, Tensor]:
        self._open_encoder()
        return super().own_state_dict()

    def _open_encoder(self) -> None:
        if self.reopen_encoder is not None and self.encoder.final_ln.weight.is_meta:
            like = self.decoder.final_ln.weight
            state = {name: tensor.to(like.device, like.dtype) for name, tensor in self.reopen_encoder().items()}
            self.encoder.load_state_dict(state, assign=True)
            self.encoder.requires_grad_(False)

    def encode_text(self, text: Tensor) -> Tensor:
        """The text encoder's states (b, text_seq_len, dim) of text tokens (b, text_seq_len)."""
        self._open_encoder()
        states = self.encoder(text)
        if self.reopen_encoder is not None:
            self.encoder.to("meta")
            release_memory(states.device)
        return states

    def check_text(self, text: Tensor) -> None:
        self.check_vocabulary(text, self.num_text_tokens)

    def _hidden(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, DalleBartCache]:
        """The decoder's hidden states (b, n + 1, dim) of the start token and n image tokens (n of a whole grid)."""
        states, mask = self.encode_text(text), (text != PAD)[:, None, None]
        tokens = F.pad(image_tokens, (1, 0), value=self.start_token)[:, : self.image_seq_len]
        layers = self.decoder.layers
        image = plain_cache([layer.self_attn.heads for layer in layers], tokens.shape, states)
        cache = DalleBartCache(image, [layer.encoder_attn.keys_and_values(states) for layer in layers], mask)
        return self.decoder(tokens, cache), cache

    def _logits(self, hidden: Tensor) -> Tensor:
        # Guidance multiplies small differences: in float32.
        return self.decoder.lm_head.outputs(hidden, stop=self.num_image_tokens).float()

    def next_token_logits(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        return self._logits(self._hidden(text, image_tokens)[0])

    def prefill(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, DalleBartCache]:
        hidden, cache = self._hidden(text, image_tokens)
        return self._logits(hidden[:, -1]), cache

    def step(self, tokens: Tensor, position: int, cache: DalleBartCache) -> Tensor:
        return self._logits(self.decoder(tokens[:, None], cache)[:, 0])

    def unconditional_text(self, text: Tensor) -> Tensor:
        row = text.new_full((self.text_seq_len,), PAD)
        row[0], row[1] = BEGIN, END
        return row.expand(len(text), -1)
