"""Reproducible uniform numbers, determined by seed, prompt, candidate and position."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def candidate_uniforms(seed: int, prompt: Tensor, candidates: Sequence[int], length: int) -> Tensor:
    """The uniform numbers in [0, 1) of some candidates of a prompt: (len(candidates), length) float64, on the CPU.

    They come from the counter-based generator Philox (Salmon et al., 2011), keyed by a hash of `seed` and the
    `prompt`'s tokens (n,) without padding, with the candidate's index as counter: the same on every machine.
    """
    tokens = prompt.detach().cpu().numpy().astype("<i8")
    tokens = np.trim_zeros(tokens, "b")
    digest = hashlib.blake2b(f"{seed}:".encode() + tokens.tobytes(), digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    rows = [np.random.Philox(key=key, counter=int(candidate) << 64).random_raw(length) for candidate in candidates]
    # 32 bits: no product with a sum near 1 can round up to the sum itself.
    return torch.from_numpy((np.stack(rows) >> np.uint64(32)).astype(np.float64) / 2**32)
