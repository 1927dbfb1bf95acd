"""Grids of image tokens on disk, as `.npy`."""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_bytes


def save_tokens(path: str | os.PathLike, tokens: Tensor) -> None:
    """Writes a grid of image tokens as `.npy`: int64, row-major, shape (side²,)."""
    buffer = io.BytesIO()
    np.save(buffer, tokens.detach().cpu().reshape(-1).numpy().astype(np.int64), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def load_tokens(path: str | os.PathLike, num_tokens: int, seq_len: int | None = None) -> Tensor:
    """Reads a token file as (side²,) int64, checked against the codebook. Raises `FileError`, never unpickles.

    `num_tokens` is the size of the codebook, `seq_len` the number of tokens wanted (any square number when None).
    A grid of shape (side, side) or (1, side²), as other tools write them, is flattened.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileError(f"there is no token file {path}") from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = "it holds pickled objects" if "pickle" in str(error).lower() else str(error).splitlines()[0]
        raise FileError(f"{path} is not a usable token file: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise FileError(f"{path} is an archive of arrays; a single array of tokens is wanted")
    if not np.issubdtype(array.dtype, np.integer):
        raise FileError(f"{path} holds {array.dtype} values; tokens are integers (int64)")
    side = int(array.size**0.5)
    flat = array.shape in {(array.size,), (1, array.size), (side, side), (1, side, side)}
    if side < 1 or side * side != array.size or not flat:
        raise FileError(f"{path} has shape {array.shape}; tokens of a square grid, ({seq_len or 'side²'},), are wanted")
    if seq_len is not None and array.size != seq_len:
        raise FileError(f"{path} holds {array.size} tokens; this model draws grids of {seq_len}")
    if array.min() < 0 or array.max() >= num_tokens:
        raise FileError(
            f"{path} holds token {array.max() if array.max() >= num_tokens else array.min()}; "
            f"this codebook has the tokens 0 to {num_tokens - 1}"
        )
    return torch.from_numpy(array.reshape(-1).astype(np.int64))
