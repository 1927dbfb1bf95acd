"""Settings of sampling from a prior."""

import math
from dataclasses import dataclass

from dalle_pytorch.errors import UsageError

DTYPES = ("auto", "float32", "int8", "bfloat16")  # see `dalle_pytorch.sampling.dtypes`
SMALLEST_TEMPERATURE = 1e-12  # logits divided by less overflow


@dataclass(frozen=True)
class SamplingSettings:
    """Filters, temperature and guidance. Raises `UsageError`, which names the setting, for values out of range.

    Attributes:
        top_k: tokens kept; below 1, the fraction of all tokens that is removed. Takes precedence over `top_p`.
        top_p: keeps the most likely tokens whose probabilities first reach this sum (arXiv:1904.09751).
        temperature: flattens the distribution (above 1) or sharpens it; 0 takes the most likely token.
        cond_scale: classifier-free guidance by the prompt (arXiv:2207.12598); 1 is none.
    """

    top_k: float | None = None
    top_p: float | None = None
    temperature: float = 1.0
    cond_scale: float = 1.0

    def __post_init__(self) -> None:
        top_k, top_p, temperature = self.top_k, self.top_p, self.temperature
        if top_k is not None and not (0 <= top_k < 1 or (top_k >= 1 and top_k % 1 == 0)):
            raise UsageError(f"top_k must be in [0, 1) or a whole number of tokens, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}")
        if temperature != 0 and not SMALLEST_TEMPERATURE <= temperature < math.inf:
            raise UsageError(f"temperature must be 0 (the most likely token) or {SMALLEST_TEMPERATURE:g} and above, "
                             f"got {temperature}")  # fmt: skip
        if not math.isfinite(self.cond_scale):
            raise UsageError(f"cond_scale must be finite, got {self.cond_scale}")
