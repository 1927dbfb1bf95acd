"""The device that a command runs on."""

import contextlib
import ctypes
import sys

import torch

from dalle_pytorch.errors import UsageError


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, by default a GPU if there is one. Raises `UsageError` if it is not available."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} is not available ({str(error).splitlines()[0]}); use cpu") from None
    return device


def release_memory(device: torch.device) -> None:
    """Returns freed memory to the device and to the system, of which PyTorch and the C library hold on to much."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
