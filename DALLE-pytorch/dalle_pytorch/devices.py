"""The device that a command runs on."""

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
