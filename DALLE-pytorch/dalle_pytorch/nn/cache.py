"""Key-value caches for generation one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The keys of a prompt of so many tokens are kept once for so many sequences: for less, one copy each is faster.
SHARED_LENGTH, SHARED_BY = 16, 8


class KVCache(nn.Module):
    """Preallocated keys and values, (b, heads, max_length, dim_head) each, of sequences of the same length.

    Where `prompts` is given, the keys and values (2, p, heads, m, dim_head) of p prompts come before them: each is kept
    once, for b / p sequences in a row that continue it.
    """

    keys: Tensor
    values: Tensor
    prompts: Tensor | None

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, prompts: Tensor | None = None
    ):
        super().__init__()
        self.length = 0 if prompts is None else prompts.shape[3]
        self.start = self.length  # of what is in `keys` and `values`
        self.register_buffer("keys", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("prompts", prompts, persistent=False)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (b, heads, n, dim_head) and returns all so far, less those of `prompts`."""
        filled = self.length - self.start
        stop = filled + keys.shape[2]
        self.keys[:, :, filled:stop] = keys
        self.values[:, :, filled:stop] = values
        self.length = self.start + stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def gather(self, rows: Tensor, max_length: int, share: bool = True) -> KVCache:
        """See `TransformerCache.gather`."""
        _, heads, _, dim_head = self.keys.shape
        options, filled = (self.keys.device, self.keys.dtype), self.length - self.start
        keys, values = self.keys[:, :, :filled], self.values[:, :, :filled]
        if self.prompts is not None:
            # Those that go on of a batch share their prompts as before, if there are as many of each.
            of_prompt = rows // (len(keys) // self.prompts.shape[1])
            prompts, counts = of_prompt.unique_consecutive(return_counts=True)
            if len(counts.unique()) > 1:
                before = self.prompts[:, of_prompt]
                cache = KVCache((len(rows), heads, max_length, dim_head), *options)
                cache.update(torch.cat((before[0], keys[rows]), 2), torch.cat((before[1], values[rows]), 2))
                return cache
            shape = (len(rows), heads, max_length - self.start, dim_head)
            cache = KVCache(shape, *options, self.prompts[:, prompts])
            cache.update(keys[rows], values[rows])
            return cache
        prompts, counts = rows.unique_consecutive(return_counts=True)
        shared = self.length >= SHARED_LENGTH and int(counts.min()) >= SHARED_BY and len(counts.unique()) == 1
        if share and shared and self.keys.device.type == "cpu":
            shape = (len(rows), heads, max_length - self.length, dim_head)
            return KVCache(shape, *options, torch.stack((keys[prompts], values[prompts])))
        cache = KVCache((len(rows), heads, max_length, dim_head), *options)
        cache.update(keys[rows], values[rows])
        return cache


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

    def gather(self, rows: Tensor, max_length: int, share: bool = True) -> TransformerCache:
        """A new cache with room for `max_length` tokens, whose sequence i continues this one's `rows[i]`.

        With `share` a prompt's keys may be kept once for its sequences, which takes less time. How they are rounded
        then depends on the number of sequences.
        """
        layers = []
        for layer in self.layers:
            rings = [None if ring is None else ring[rows] for ring in (layer.attn_ring, layer.ff_ring)]
            layers.append(LayerCache(layer.kv.gather(rows, max_length, share), *rings))
        return TransformerCache(layers)


def plain_cache(heads: Sequence[int], shape: Sequence[int], like: Tensor) -> TransformerCache:
    """An empty cache without token shift for sequences of `shape` (b, n), a layer for each number of heads, of the
    width, device and dtype of `like` (..., dim)."""
    batch, length = shape
    sizes = [(batch, count, length, like.shape[-1] // count) for count in heads]
    return TransformerCache([LayerCache(KVCache(size, like.device, like.dtype), None, None) for size in sizes])
