"""The optimizers of a training."""

import torch
from torch import nn

from dalle_pytorch.training.settings import OptimizationSettings


def make_optimizers(task: nn.Module, settings: OptimizationSettings) -> list[torch.optim.Optimizer]:
    """AdamW for what `task` trains, without weight decay for vectors; with `muon` it leaves the matrices to Muon."""
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
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return optimizers
