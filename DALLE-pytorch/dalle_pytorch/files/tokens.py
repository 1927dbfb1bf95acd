"""Grids of image tokens on disk, as `.npy`."""

import io
import os

import numpy as np
import torch
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.files.boundary import opening


def save_tokens(path: str | os.PathLike, tokens: Tensor) -> None:
    """Writes a grid of image tokens as `.npy`: int64, row-major, shape (side²,), or (rows, columns) if not square."""
    grid = tokens if tokens.ndim == 2 and tokens.shape[0] != tokens.shape[1] else tokens.reshape(-1)
    buffer = io.BytesIO()
    np.save(buffer, grid.detach().cpu().numpy().astype(np.int64), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def load_tokens(path: str | os.PathLike, num_tokens: int, seq_len: int | None = None) -> Tensor:
    """Reads a token file as (side²,) int64, checked against the codebook. Raises `FileError`, never unpickles.

    `num_tokens` is the size of the codebook, `seq_len` the expected number of tokens (None for any square).
    Shapes (side, side), (1, side²) and (1, side, side), as other tools write them, are flattened.
    """
    with opening(path, "is not a usable token file", FileError):
        # Mapped, so that a header cannot claim more than there is.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise FileError(f"{path}: expected an array of tokens, got an archive")
    if not np.issubdtype(array.dtype, np.integer):
        raise FileError(f"{path}: expected integers (int64), got {array.dtype}")
    side = int(array.size**0.5)
    flat = array.shape in {(array.size,), (1, array.size), (side, side), (1, side, side)}
    if side < 1 or side * side != array.size or not flat:
        raise FileError(f"{path}: expected the shape ({seq_len or 'side²'},), got {array.shape}")
    if seq_len is not None and array.size != seq_len:
        raise FileError(f"{path}: expected {seq_len} tokens, got {array.size}")
    if array.min() < 0 or array.max() >= num_tokens:
        wrong = array.max() if array.max() >= num_tokens else array.min()
        raise FileError(f"{path}: expected tokens from 0 to {num_tokens - 1}, got {wrong}")
    return torch.from_numpy(np.array(array, np.int64).reshape(-1))
