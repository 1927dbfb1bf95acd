"""The transformer of the prior and of CLIP: pre-norm residual branches with layer scale, sequential or reversible."""

from collections.abc import Sequence
from itertools import cycle
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.attention import Attention
from dalle_pytorch.nn.cache import KVCache, LayerCache, TransformerCache
from dalle_pytorch.nn.checkpointing import Checkpointed
from dalle_pytorch.nn.masks import make_pattern
from dalle_pytorch.nn.reversible import ReversibleSequence
from dalle_pytorch.nn.rotary import rotary_table
from dalle_pytorch.nn.token_shift import TokenShift


class FeedForward(nn.Module):
    """Two linear layers with a gated GELU between them (GEGLU, arXiv:2002.05202)."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        if not torch.is_grad_enabled():
            gate = gate.contiguous()  # for another GELU: faster, and of the same bits for one row and for many
        return self.proj_out(self.dropout(value * F.gelu(gate)))


Inner = TypeVar("Inner", Attention, FeedForward)


class Branch(nn.Module, Generic[Inner]):
    """A residual branch: norm, token shift, attention or feed-forward `fn`, optional second norm, layer scale.

    The scale is initialised by depth (CaiT, arXiv:2103.17239); see `Transformer.set_layer_scale`.
    """

    def __init__(self, dim: int, fn: Inner, layer: int, sandwich_norm: bool, shift: TokenShift | None):
        super().__init__()
        scale = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
        self.norm = nn.LayerNorm(dim)
        self.shift = shift
        self.fn = fn
        self.norm_out = nn.LayerNorm(dim) if sandwich_norm else nn.Identity()
        self.scale = nn.Parameter(torch.full((1, 1, dim), scale))

    def forward(
        self, x: Tensor, start: int = 0, ring: Tensor | None = None, onto: Tensor | None = None, **kwargs
    ) -> Tensor:
        """The residual of a stream (b, n, dim) that begins at position `start`, added to `onto` if that is given;
        `ring` is the token shift's cache."""
        x = self.norm(x)
        if self.shift is not None:
            if ring is not None and start > 0:
                x = self.shift.step(x, ring, start)
            else:
                if ring is not None:
                    self.shift.fill(x, ring)
                x = self.shift(x)
        x = self.norm_out(self.fn(x, **kwargs))
        return x * self.scale if onto is None else torch.addcmul(onto, x, self.scale)


class Layer(Checkpointed):
    """One attention branch and one feed-forward branch, sequential unless the layers are reversible.

    With `activation_checkpointing` only the input is stored for the backward pass, and the rest recomputed
    (arXiv:1604.06174).
    """

    def __init__(self, attn: Branch[Attention], ff: Branch[FeedForward]):
        super().__init__()
        self.attn = attn
        self.ff = ff

    def forward(self, x: Tensor, attn_kwargs: dict, ff_kwargs: dict) -> Tensor:
        """Maps (b, n, dim) to (b, n, dim)."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, attn_kwargs, ff_kwargs, use_reentrant=False)
        return self._run(x, attn_kwargs, ff_kwargs)

    def _run(self, x: Tensor, attn_kwargs: dict, ff_kwargs: dict) -> Tensor:
        x = self.attn(x, onto=x, **attn_kwargs)
        return self.ff(x, onto=x, **ff_kwargs)


class Transformer(nn.Module):
    """DALLE-pytorch's transformer, over a plain sequence or, with `image_fmap_size`, <bos>, text and image tokens.

    `attn_types` cycles over the layers; layers with the same number in `shared_attn_ids` or `shared_ff_ids` share the
    attention or feed-forward module, while norms and scales stay their own.
    """

    layers: Sequence[Layer]
    rotary: Tensor | None

    def __init__(
        self, *, dim: int, depth: int, heads: int = 8, dim_head: int = 64, causal: bool = True, text_len: int = 0,
        image_fmap_size: int = 0, reversible: bool = False, attn_dropout: float = 0.0, ff_dropout: float = 0.0,
        attn_types: Sequence[str] = ("full",), sandwich_norm: bool = False, shift_tokens: bool = False,
        rotary_emb: bool = False, shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None, qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not image_fmap_size and (shift_tokens or rotary_emb or set(attn_types) != {"full"}):
            raise UsageError("shift_tokens, rotary_emb and attn_types other than full need image_fmap_size")
        self.reversible = reversible
        shared_ids = (cycle(ids or range(depth)) for ids in (shared_attn_ids, shared_ff_ids))
        patterns: dict[str, nn.Module | None] = {}
        attns: dict[int, tuple[str, Attention]] = {}
        ffs: dict[int, FeedForward] = {}
        shift = TokenShift(text_len, image_fmap_size) if shift_tokens else None
        layers = []
        for layer, attn_type, attn_id, ff_id in zip(range(depth), cycle(attn_types), *shared_ids, strict=False):
            if attn_id not in attns:
                # Masks are the same in all layers of a type; the random blocks of `sparse` are a layer's own.
                if attn_type not in patterns or attn_type == "sparse":
                    patterns[attn_type] = make_pattern(attn_type, text_len, image_fmap_size, seed=layer)
                attn = Attention(dim, heads, dim_head, causal, attn_dropout, qk_norm, patterns[attn_type])
                attns[attn_id] = attn_type, attn
            if ff_id not in ffs:
                ffs[ff_id] = FeedForward(dim, dropout=ff_dropout)
            first_type, attn = attns[attn_id]
            if first_type != attn_type:
                raise UsageError(f"shared_attn_ids shares attention between {first_type} and {attn_type} layers")
            options = layer, sandwich_norm, shift
            layers.append(Layer(Branch(dim, attn, *options), Branch(dim, ffs[ff_id], *options)))
        self.add_module("layers", nn.ModuleList(layers))
        table = rotary_table(dim_head, text_len, image_fmap_size) if rotary_emb else None
        self.register_buffer("rotary", table, persistent=False)

    def set_layer_scale(self, value: float) -> None:
        """Sets the scale of every branch, before training: small transformers learn faster from 1 than from 0.1."""
        for layer in self.layers:
            for branch in (layer.attn, layer.ff):
                nn.init.constant_(branch.scale, value)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: TransformerCache | None = None) -> Tensor:
        """Maps (b, n, dim) to (b, n, dim). `key_mask` (b, n) is false at tokens to ignore.

        With a `cache` the sequence continues it: first a whole prompt, then one image token per call.
        """
        start = cache.length if cache is not None else 0
        if start > 0 and x.shape[1] != 1:
            raise ValueError(f"expected one token to continue the cache, got {x.shape[1]}")
        rotary = None if self.rotary is None else self.rotary[start : start + x.shape[1]]
        kwargs = {"rotary": rotary, "key_mask": key_mask}
        if self.reversible and cache is None and torch.is_grad_enabled():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            branches = [(layer.attn, layer.ff) for layer in self.layers]
            x1, x2 = ReversibleSequence.apply(x, x, branches, kwargs, *parameters)
            return (x1 + x2) / 2

        x1 = x2 = x
        for i, layer in enumerate(self.layers):
            attn_kwargs, ff_kwargs = kwargs, {}
            if cache is not None:
                layer_cache = cache.layers[i]
                attn_kwargs = {**kwargs, "start": start, "ring": layer_cache.attn_ring, "cache": layer_cache.kv}
                ff_kwargs = {"start": start, "ring": layer_cache.ff_ring}
            if self.reversible:
                x1 = layer.attn(x2, onto=x1, **attn_kwargs)
                x2 = layer.ff(x1, onto=x2, **ff_kwargs)
            else:
                x = layer(x, attn_kwargs, ff_kwargs)
        return (x1 + x2) / 2 if self.reversible else x

    def make_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> TransformerCache:
        """An empty cache for `batch` sequences of up to `max_length` tokens."""
        layers = []
        for layer in self.layers:
            attn, shift = layer.attn.fn, layer.attn.shift
            dim_head = attn.to_out.in_features // attn.heads
            rings: list[Tensor | None] = [None, None]
            if shift is not None:
                shape = (batch, shift.image_fmap_size, 2 * -(-attn.to_out.out_features // 4))
                rings = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
            layers.append(LayerCache(KVCache((batch, attn.heads, max_length, dim_head), device, dtype), *rings))
        return TransformerCache(layers)
