"""Key-value caches for generation one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """Preallocated keys and values, (b, heads, max_length, dim_head) each, of which the first `length` are filled."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.length = 0
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (b, heads, n, dim_head) and returns all so far."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class LayerCache(nn.Module):
    """Keys and values of one layer, and the last row of image tokens for each of its token shifts."""

    attn_ring: Tensor | None
    ff_ring: Tensor | None

    def __init__(self, kv: KVCache, attn_ring: Tensor | None, ff_ring: Tensor | None):
        super().__init__()
        self.kv = kv
        self.register_buffer("attn_ring", attn_ring, persistent=False)
        self.register_buffer("ff_ring", ff_ring, persistent=False)


class TransformerCache(nn.Module):
    """The caches of all layers, of fixed shape, of which `length` tokens are filled."""

    layers: Sequence[LayerCache]

    def __init__(self, layers: Sequence[LayerCache]):
        super().__init__()
        self.add_module("layers", nn.ModuleList(layers))

    @property
    def length(self) -> int:
        return self.layers[0].kv.length

    def gather(self, rows: Tensor, max_length: int) -> TransformerCache:
        """A new cache with room for `max_length` tokens, whose sequence i continues this one's `rows[i]`."""
        layers = []
        for layer in self.layers:
            _, heads, _, dim_head = layer.kv.keys.shape
            kv = KVCache((len(rows), heads, max_length, dim_head), layer.kv.keys.device, layer.kv.keys.dtype)
            kv.update(layer.kv.keys[rows, :, : self.length], layer.kv.values[rows, :, : self.length])
            rings = [None if ring is None else ring[rows] for ring in (layer.attn_ring, layer.ff_ring)]
            layers.append(LayerCache(kv, *rings))
        return TransformerCache(layers)


def plain_cache(heads: Sequence[int], shape: Sequence[int], like: Tensor) -> TransformerCache:
    """An empty cache without token shift for sequences of `shape` (b, n), a layer for each number of heads, of the
    width, device and dtype of `like` (..., dim)."""
    batch, length = shape
    sizes = [(batch, count, length, like.shape[-1] // count) for count in heads]
    return TransformerCache([LayerCache(KVCache(size, like.device, like.dtype), None, None) for size in sizes])
