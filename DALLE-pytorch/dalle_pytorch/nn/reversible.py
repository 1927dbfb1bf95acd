"""Reversible layers: activations are recomputed in the backward pass instead of stored."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ReversibleSequence(torch.autograd.Function):
    """Runs layers y1 = x1 + attn(x2), y2 = x2 + ff(y1) and keeps only the last output for the backward pass.

    Each layer's input is recomputed from its output (RevNet, arXiv:1707.04585; Reformer, arXiv:2001.04451), so that
    memory does not grow with depth, with the same random numbers for dropout and the same autocast setting.
    """

    @staticmethod
    def forward(
        ctx, x1: Tensor, x2: Tensor, layers: Sequence[tuple[nn.Module, nn.Module]], kwargs: dict, *parameters: Tensor
    ):
        ctx.layers, ctx.kwargs, ctx.parameters = layers, kwargs, parameters
        ctx.devices = [x1.device] if x1.is_cuda else []
        device = x1.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random_states = []
        for attn, ff in layers:
            ctx.random_states.append(_random_state(ctx.devices))
            x1 = x1 + attn(x2, **kwargs)
            ctx.random_states.append(_random_state(ctx.devices))
            x2 = x2 + ff(x1)
        ctx.save_for_backward(x1.detach(), x2.detach())
        return x1, x2

    @staticmethod
    def backward(ctx, grad1: Tensor, grad2: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y1, y2 = ctx.saved_tensors
        grads: dict[Tensor, Tensor] = {}

        def undo(branch: nn.Module, kept: Tensor, changed: Tensor, grad: Tensor, random_state: tuple, kwargs: dict):
            """`changed` before `branch(kept)` was added to it, and the gradient at `kept`."""
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
            attn, ff = ctx.layers[i]
            y2, grad = undo(ff, y1, y2, grad2, ctx.random_states[2 * i + 1], {})
            grad1 = grad1 + grad
            y1, grad = undo(attn, y2, y1, grad1, ctx.random_states[2 * i], ctx.kwargs)
            grad2 = grad2 + grad
        return grad1, grad2, None, None, *(grads.get(parameter) for parameter in ctx.parameters)


def _random_state(devices: list[torch.device]) -> tuple:
    return torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)


def _set_random_state(devices: list[torch.device], state: tuple) -> None:
    torch.set_rng_state(state[0])
    for device, value in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(value, device)
