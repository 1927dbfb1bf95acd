"""What a codebook's training counts, over all processes: so that every process comes to the same codebook."""

import torch
from torch import Tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor`, to which those of the other processes have been added in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def from_first_process(tensor: Tensor) -> Tensor:
    """`tensor`, overwritten in place by that of the first process."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, 0)
    return tensor


def count_codes(tokens: Tensor, num_tokens: int) -> Tensor:
    """How often each code is among the tokens of all processes, (num_tokens,) float32."""
    return sum_over_processes(torch.bincount(tokens.flatten(), minlength=num_tokens).float())


def unused_codes(counts: Tensor) -> Tensor:
    """Which codes (num_tokens,) have less than a fiftieth of the mean of `counts` (num_tokens,)."""
    return counts < 0.02 * counts.mean()


def codebook_use(counts: Tensor) -> dict[str, Tensor]:
    """The perplexity of the codes, between 1 and their number, and the share of them that is in use."""
    share = counts / counts.sum().clamp(min=1e-9)
    perplexity = torch.exp(-(share * share.clamp(min=1e-9).log()).sum())
    return {"perplexity": perplexity, "codes_used": 1 - unused_codes(counts).float().mean()}
