"""Multi-head attention with a projection each for queries, keys, values and output, as BART and GPT have it."""

from torch import Tensor, nn

from dalle_pytorch.nn.attention_weights import DotProductAttention


class CrossAttention(DotProductAttention):
    """Attention of one sequence to another, or to itself."""

    def __init__(self, dim: int, heads: int, bias: bool = False):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"a width of {dim} cannot be divided among {heads} heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, heads, n, dim / heads) of a sequence (b, n, dim)."""
        return self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        prompts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`x` (b, n, dim) attends to keys and values (g, heads, m, dim / heads), each set of which serves b / g rows of
        `x` in a row. `mask` broadcasts to (g, heads, b / g · n, m) and is false at keys to ignore. For
        `prompts` see `attend`."""
        queries = self._split(self.q_proj(x.reshape(len(keys), -1, x.shape[-1])))
        out = self.attend(queries, keys, values, mask, is_causal, prompts)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))
