"""Multi-head attention with a key-value cache, a mask pattern and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.nn.attention_weights import DotProductAttention
from dalle_pytorch.nn.cache import KVCache
from dalle_pytorch.nn.rotary import apply_rotary


class Attention(DotProductAttention):
    """Multi-head attention; `qk_norm` adds an RMS norm on queries and keys (arXiv:2302.05442), before the rotation."""

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, causal: bool = True, dropout: float = 0.0,
        qk_norm: bool = False, pattern: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.pattern = pattern
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.q_norm = nn.RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: Tensor | None = None, key_mask: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """`x` is (b, n, dim): a sequence from its start, or one token that continues `cache`.

        `rotary` holds the n positions' rows of `rotary_table`; `key_mask` (b, n) is false at keys to ignore.
        """
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, -1)
        if self.q_norm is not None and self.k_norm is not None:
            qk, v = qkv.split((2, 1), dim=2)
            weights = torch.stack((self.q_norm.weight, self.k_norm.weight))[:, None]
            # Both at once, and in the dtype of the input: autocast does not cast weights, and mixed dtypes are slow.
            qk = F.rms_norm(qk, qk.shape[-1:], eps=self.q_norm.eps) * weights.to(qk.dtype)
            qkv = torch.cat((qk, v), dim=2)
        if rotary is not None:
            # DALLE-pytorch rotates the values too.
            qkv = apply_rotary(qkv.flatten(2, 3), rotary).view_as(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v)

        mask = None
        if self.pattern is not None:
            stop = length if cache is None else cache.length
            mask = self.pattern(stop - length, stop)
        elif key_mask is not None:
            mask = key_mask[:, None, None, :]
        is_causal = self.causal and mask is None and length > 1
        out = self.attend(q, k, v, mask, is_causal, None if cache is None else cache.prompts)
        return self.dropout(self.to_out(out.transpose(1, 2).reshape(batch, length, -1)))
