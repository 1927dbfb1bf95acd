"""Activation checkpointing."""

from torch import nn


class Checkpointed(nn.Module):
    """A module that can keep its inputs alone in training, and recompute the rest in the backward pass."""

    activation_checkpointing: bool = False
