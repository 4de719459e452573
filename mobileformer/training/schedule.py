"""The learning rate, and which tensors the weight decay acts on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mobileformer.training.recipe import Recipe

__all__ = ["decay_groups", "learning_rate", "make_optimizer"]


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The rate after `epoch` epochs: a linear rise, which stands in for the cosine's head, the cosine, the cool-down.

        rise    w + epoch (l - w) / n                            epoch < n = warmup_epochs
        cosine  m + (l - m) (1 + cos(pi epoch / epochs)) / 2     epoch < epochs
        after   m

    with l learning_rate, w warmup_learning_rate, m minimum_learning_rate. Source: timm's CosineLRScheduler.
    """
    if epoch < recipe.warmup_epochs:
        start = recipe.warmup_learning_rate
        return start + epoch * (recipe.learning_rate - start) / recipe.warmup_epochs
    if epoch < recipe.epochs:
        swing = 1 + math.cos(math.pi * epoch / recipe.epochs)
        return recipe.minimum_learning_rate + (recipe.learning_rate - recipe.minimum_learning_rate) * swing / 2
    return recipe.minimum_learning_rate


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: without decay, and with it.

    No decay for tensors of one dimension (norms, biases) and names that end in ".bias"; the table of tokens does
    decay. Source: timm 0.3.4, which the published networks were trained with. Frozen parameters are left out.
    """
    without, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (without if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": without, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over `decay_groups`."""
    return torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,  # the same equations, in one pass over each tensor
    )
