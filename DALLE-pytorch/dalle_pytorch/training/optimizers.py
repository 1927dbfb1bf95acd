"""The optimizers of a training."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dalle_pytorch.training.settings import OptimizationSettings
from dalle_pytorch.training.tasks.base import SharedRows

Closure = Callable[[], float]


def make_optimizers(
    task: nn.Module, settings: OptimizationSettings, shared: Iterable[SharedRows] = ()
) -> list[torch.optim.Optimizer]:
    """AdamW for what `task` trains, without weight decay for vectors; with `muon` it leaves the matrices to Muon.
    Rows that are `shared` move together too."""
    matrices, decayed, plain = [], [], []
    embeddings = {id(m.weight) for m in task.modules() if isinstance(m, nn.Embedding)}
    heads = {id(p) for name, p in task.named_parameters() if "logits" in name}
    for parameter in task.parameters():
        if not parameter.requires_grad:
            continue
        if settings.muon and parameter.ndim == 2 and id(parameter) not in embeddings | heads:
            matrices.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [AdamW(groups, settings.learning_rate, shared)]
    if matrices:
        optimizers.append(Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay))
    return optimizers


class AdamW(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) whose `shared` rows of matrices also move together where their features are alike.

    To such a matrix belongs a second one, features × columns, whose product with the features is added to its rows.
    It is never kept: AdamW's step for it is added at once, and only its moments remain.
    """

    def __init__(self, groups: list[dict], lr: float, shared: Iterable[SharedRows] = ()):
        super().__init__(groups, lr=lr, betas=(0.9, 0.98))
        self.shared = [*shared]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        loss = super().step(closure)
        if not self.shared:
            return loss
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for i, (weight, features) in enumerate(self.shared):
            if weight.grad is None:
                continue
            self.shared[i] = SharedRows(weight, features := features.to(weight))
            group, state, rows = groups[weight], self.state[weight], len(features)
            (beta1, beta2), steps = group["betas"], float(state["step"])
            grad = features.T @ weight.grad[-rows:]
            if "shared_exp_avg" not in state:
                state |= {"shared_exp_avg": torch.zeros_like(grad), "shared_exp_avg_sq": torch.zeros_like(grad)}
            mean, square = state["shared_exp_avg"].lerp_(grad, 1 - beta1), state["shared_exp_avg_sq"]
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            size = (square / (1 - beta2**steps)).sqrt().add_(group["eps"])
            weight[-rows:] -= features @ (mean / size) * (group["lr"] / (1 - beta1**steps))
        return loss


class Muon(torch.optim.Muon):
    """torch's Muon with steps as large as AdamW's (arXiv:2502.16982), in float32 on CPUs: torch's own iterates in
    bfloat16, which takes a CPU without instructions for it twenty times as long."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"],
                                        group["ns_steps"], group["eps"])  # fmt: skip
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
        return loss


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The matrix (m, n) with singular values near 1, by the quintic Newton–Schulz iteration of Muon."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
