"""The transformer of the prior and of CLIP: pre-norm residual branches with layer scale, sequential or reversible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.attention import Attention, KVCache, make_pattern, rotary_table

# --------------------------------------------------------------------------------------------------
# Parts


class FeedForward(nn.Module):
    """Two linear layers with a gated GELU between them (GEGLU, arXiv:2002.05202)."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(self.dropout(value * F.gelu(gate)))


class TokenShift(nn.Module):
    """Gives each token some channels of its neighbours.

    A text token takes the first half of its channels from the token before it; an image token takes a quarter from
    the token above and a quarter from the one to the left, zeros at the border.
    """

    def __init__(self, text_len: int, image_fmap_size: int):
        super().__init__()
        self.text_len = text_len
        self.image_fmap_size = image_fmap_size

    def forward(self, x: Tensor) -> Tensor:
        """Shifts a sequence (b, n, dim) that starts with <bos>."""
        side = self.image_fmap_size
        text, image = x[:, : self.text_len], x[:, self.text_len :]
        before, stays = text.chunk(2, dim=-1)
        parts = [torch.cat((F.pad(before, (0, 0, 1, -1)), stays), dim=-1)]
        if length := image.shape[1]:
            above, left, *stays = image.chunk(4, dim=-1)
            above = F.pad(above, (0, 0, side, 0))[:, :length]
            left = F.pad(left, (0, 0, 1, -1))
            first_column = torch.arange(length, device=x.device) % side == 0
            left = left.masked_fill(first_column[:, None], 0)
            parts.append(torch.cat((above, left, *stays), dim=-1))
        return torch.cat(parts, dim=1)

    def fill(self, x: Tensor, ring: Tensor) -> None:
        """Remembers in `ring` (b, side, width) the last image tokens, unshifted, of a sequence (b, n, dim)."""
        positions = torch.arange(x.shape[1] - self.text_len)[-self.image_fmap_size :]
        ring[:, positions % self.image_fmap_size] = x[:, self.text_len + positions, : ring.shape[-1]]

    def step(self, x: Tensor, ring: Tensor, position: int) -> Tensor:
        """Shifts the one image token (b, 1, dim) at `position` of the sequence and remembers it in `ring`."""
        width = ring.shape[-1]
        column = (position - self.text_len) % self.image_fmap_size
        token = x[:, 0]
        # A ring of one row: the slot about to be written holds the token above, the slot before it the one to the left.
        above = ring[:, column, : width // 2].clone()
        left = ring[:, column - 1, width // 2 :] if column else torch.zeros_like(above)
        shifted = torch.cat((above, left, token[:, width:]), dim=-1)
        ring[:, column] = token[:, :width]
        return shifted[:, None]


class Branch(nn.Module):
    """A residual branch: norm, token shift, attention or feed-forward `fn`, optional second norm, layer scale.

    The scale's first value falls with depth (CaiT, arXiv:2103.17239); see `Transformer.set_layer_scale`.
    """

    def __init__(self, dim: int, fn: nn.Module, layer: int, sandwich_norm: bool, shift: TokenShift | None):
        super().__init__()
        scale = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
        self.norm = nn.LayerNorm(dim)
        self.shift = shift
        self.fn = fn
        self.norm_out = nn.LayerNorm(dim) if sandwich_norm else nn.Identity()
        self.scale = nn.Parameter(torch.full((1, 1, dim), scale))

    def forward(self, x: Tensor, start: int = 0, ring: Tensor | None = None, **kwargs) -> Tensor:
        """What is added to the stream (b, n, dim), which begins at position `start`; `ring` is the shift's memory."""
        x = self.norm(x)
        if self.shift is not None:
            if start > 0:
                x = self.shift.step(x, ring, start)
            else:
                if ring is not None:
                    self.shift.fill(x, ring)
                x = self.shift(x)
        return self.norm_out(self.fn(x, **kwargs)) * self.scale


class Layer(nn.Module):
    """One attention branch and one feed-forward branch, run one after the other unless the layers are reversible.

    With `activation_checkpointing`, which a training may set, only the input is kept for the gradient and the rest is
    computed again (arXiv:1604.06174).
    """

    activation_checkpointing = False

    def __init__(self, attn: Branch, ff: Branch):
        super().__init__()
        self.attn = attn
        self.ff = ff

    def forward(self, x: Tensor, attn_kwargs: dict, ff_kwargs: dict) -> Tensor:
        """Maps (b, n, dim) to (b, n, dim)."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, attn_kwargs, ff_kwargs, use_reentrant=False)
        return self._run(x, attn_kwargs, ff_kwargs)

    def _run(self, x: Tensor, attn_kwargs: dict, ff_kwargs: dict) -> Tensor:
        x = x + self.attn(x, **attn_kwargs)
        return x + self.ff(x, **ff_kwargs)


# --------------------------------------------------------------------------------------------------
# What one-token steps remember


class LayerCache(nn.Module):
    """Keys and values of one layer, and the last row of image tokens for each of its token shifts."""

    def __init__(self, kv: KVCache, attn_ring: Tensor | None, ff_ring: Tensor | None):
        super().__init__()
        self.kv = kv
        self.register_buffer("attn_ring", attn_ring, persistent=False)
        self.register_buffer("ff_ring", ff_ring, persistent=False)


class TransformerCache(nn.Module):
    """What the layers remember of a sequence, of fixed shape; `length` tokens have gone in so far."""

    def __init__(self, layers: Sequence[LayerCache]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def length(self) -> int:
        return self.layers[0].kv.length

    def gather(self, rows: Tensor, max_length: int) -> TransformerCache:
        """A new cache with room for `max_length` tokens whose sequence i goes on from this one's `rows[i]`."""
        layers = []
        for layer in self.layers:
            _, heads, _, dim_head = layer.kv.keys.shape
            kv = KVCache((len(rows), heads, max_length, dim_head), layer.kv.keys.device, layer.kv.keys.dtype)
            kv.update(layer.kv.keys[rows, :, : self.length], layer.kv.values[rows, :, : self.length])
            rings = (None if ring is None else ring[rows] for ring in (layer.attn_ring, layer.ff_ring))
            layers.append(LayerCache(kv, *rings))
        return TransformerCache(layers)


# --------------------------------------------------------------------------------------------------
# Reversible layers


class ReversibleSequence(torch.autograd.Function):
    """Runs layers y1 = x1 + attn(x2), y2 = x2 + ff(y1) and keeps only the last output for the backward pass.

    Each layer's input is computed back from its output (RevNet, arXiv:1707.04585; Reformer, arXiv:2001.04451), so that
    memory does not grow with depth. Dropout draws the same numbers again, under the same autocast setting.
    """

    @staticmethod
    def forward(ctx, x1: Tensor, x2: Tensor, layers: Sequence[Layer], kwargs: dict, *parameters: Tensor):
        ctx.layers, ctx.kwargs, ctx.parameters = layers, kwargs, parameters
        ctx.devices = [x1.device] if x1.is_cuda else []
        device = x1.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random_states = []
        for layer in layers:
            ctx.random_states.append(_random_state(ctx.devices))
            x1 = x1 + layer.attn(x2, **kwargs)
            ctx.random_states.append(_random_state(ctx.devices))
            x2 = x2 + layer.ff(x1)
        ctx.save_for_backward(x1.detach(), x2.detach())
        return x1, x2

    @staticmethod
    def backward(ctx, grad1: Tensor, grad2: Tensor):
        y1, y2 = ctx.saved_tensors
        grads: dict[Tensor, Tensor] = {}

        def undo(branch: Branch, kept: Tensor, changed: Tensor, grad: Tensor, random_state: tuple, kwargs: dict):
            """What `changed` was before `branch(kept)` was added to it, and the gradient that reaches `kept`."""
            parameters = [parameter for parameter in branch.parameters() if parameter.requires_grad]
            kept = kept.detach().requires_grad_()
            device, dtype, enabled = ctx.autocast
            with torch.enable_grad(), torch.random.fork_rng(ctx.devices), torch.autocast(device, dtype, enabled):
                _set_random_state(ctx.devices, random_state)
                out = branch(kept, **kwargs)
            grad_kept, *grad_parameters = torch.autograd.grad(out, [kept, *parameters], grad.to(out.dtype))
            for parameter, value in zip(parameters, grad_parameters, strict=True):
                grads[parameter] = grads[parameter] + value if parameter in grads else value
            return changed - out.detach(), grad_kept

        for i in reversed(range(len(ctx.layers))):
            layer = ctx.layers[i]
            y2, grad = undo(layer.ff, y1, y2, grad2, ctx.random_states[2 * i + 1], {})
            grad1 = grad1 + grad
            y1, grad = undo(layer.attn, y2, y1, grad1, ctx.random_states[2 * i], ctx.kwargs)
            grad2 = grad2 + grad
        return grad1, grad2, None, None, *(grads.get(parameter) for parameter in ctx.parameters)


def _random_state(devices: list[torch.device]) -> tuple:
    return torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)


def _set_random_state(devices: list[torch.device], state: tuple) -> None:
    torch.set_rng_state(state[0])
    for device, value in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(value, device)


# --------------------------------------------------------------------------------------------------
# The whole


class Transformer(nn.Module):
    """DALLE-pytorch's transformer, over a plain sequence or, with `image_fmap_size`, <bos>, text and image tokens.

    `attn_types` cycles over the layers; layers with the same number in `shared_attn_ids` or `shared_ff_ids` share the
    attention or feed-forward module, while norms and scales stay their own.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        text_len: int | None = None,
        image_fmap_size: int | None = None,
        reversible: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        attn_types: Sequence[str] = ("full",),
        sandwich_norm: bool = False,
        shift_tokens: bool = False,
        rotary_emb: bool = False,
        shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        if image_fmap_size is None and (shift_tokens or rotary_emb or set(attn_types) != {"full"}):
            raise ValueError("token shift, rotary positions and attention patterns want a sequence with an image grid")
        self.reversible = reversible
        attn_types = list(islice(cycle(attn_types), depth))
        attn_ids = list(islice(cycle(shared_attn_ids or range(depth)), depth))
        ff_ids = list(islice(cycle(shared_ff_ids or range(depth)), depth))
        patterns: dict[str, nn.Module | None] = {}
        attns: dict[int, tuple[str, Attention]] = {}
        ffs: dict[int, FeedForward] = {}
        shift = TokenShift(text_len, image_fmap_size) if shift_tokens else None
        layers = []
        for layer, (attn_type, attn_id, ff_id) in enumerate(zip(attn_types, attn_ids, ff_ids, strict=True)):
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
                raise ValueError(f"shared_attn_ids shares the attention of {first_type} and {attn_type} layers")
            layers.append(Layer(*(Branch(dim, fn, layer, sandwich_norm, shift) for fn in (attn, ffs[ff_id]))))
        self.layers = nn.ModuleList(layers)
        table = rotary_table(dim_head, text_len, image_fmap_size) if rotary_emb else None
        self.register_buffer("rotary", table, persistent=False)

    def set_layer_scale(self, value: float) -> None:
        """Gives every branch this scale, before training: small transformers learn faster from 1 than from 0.1."""
        for layer in self.layers:
            for branch in (layer.attn, layer.ff):
                nn.init.constant_(branch.scale, value)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: TransformerCache | None = None) -> Tensor:
        """Maps (b, n, dim) to (b, n, dim). `key_mask` (b, n) is false at tokens that no other looks at.

        With a `cache` the sequence goes on where the cache ends: first a whole prompt, then one image token at a time.
        """
        start = cache.length if cache is not None else 0
        if start > 0 and x.shape[1] != 1:
            raise ValueError(f"a cache is gone on from one token at a time, not {x.shape[1]}")
        rotary = None if self.rotary is None else self.rotary[start : start + x.shape[1]]
        kwargs = {"rotary": rotary, "key_mask": key_mask}
        if self.reversible and cache is None and torch.is_grad_enabled():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            x1, x2 = ReversibleSequence.apply(x, x, self.layers, kwargs, *parameters)
            return (x1 + x2) / 2

        x1 = x2 = x
        for i, layer in enumerate(self.layers):
            attn_kwargs, ff_kwargs = kwargs, {}
            if cache is not None:
                memory = cache.layers[i]
                attn_kwargs = {**kwargs, "start": start, "ring": memory.attn_ring, "cache": memory.kv}
                ff_kwargs = {"start": start, "ring": memory.ff_ring}
            if self.reversible:
                x1 = x1 + layer.attn(x2, **attn_kwargs)
                x2 = x2 + layer.ff(x1, **ff_kwargs)
            else:
                x = layer(x, attn_kwargs, ff_kwargs)
        return (x1 + x2) / 2 if self.reversible else x

    def make_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> TransformerCache:
        """An empty cache for `batch` sequences of up to `max_length` tokens."""
        layers = []
        for layer in self.layers:
            attn, shift = layer.attn.fn, layer.attn.shift
            dim_head = attn.to_out.in_features // attn.heads
            rings = (None, None)
            if shift is not None:
                shape = (batch, shift.image_fmap_size, 2 * -(-attn.to_out.out_features // 4))
                rings = tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            layers.append(LayerCache(KVCache((batch, attn.heads, max_length, dim_head), device, dtype), *rings))
        return TransformerCache(layers)
