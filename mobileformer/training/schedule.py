"""The learning rate, and which tensors the weight decay acts on."""

from __future__ import annotations

import math
from collections.abc import Callable
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

    with l learning_rate, w warmup_learning_rate, m minimum_learning_rate. Source: timm's CosineLRScheduler. With
    `drops` l / 10^(how many of them are at most `epoch`) stands for the cosine.
    """
    if epoch < recipe.warmup_epochs:
        start = recipe.warmup_learning_rate
        return start + epoch * (recipe.learning_rate - start) / recipe.warmup_epochs
    if recipe.drops:
        return recipe.learning_rate / 10 ** sum(drop <= epoch for drop in recipe.drops)
    if epoch < recipe.epochs:
        swing = 1 + math.cos(math.pi * epoch / recipe.epochs)
        return recipe.minimum_learning_rate + (recipe.learning_rate - recipe.minimum_learning_rate) * swing / 2
    return recipe.minimum_learning_rate


def decay_groups(
    model: nn.Module, weight_decay: float, share: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Two groups for an optimizer, without decay and with it; and two more for each other share of the learning rate.

    No decay for tensors of one dimension (norms, biases) and names that end in ".bias"; the table of tokens does
    decay. Source: timm 0.3.4, which the published networks were trained with. Frozen parameters are left out.
    """
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without, decayed = groups.setdefault(share(name), ([], []))
            (without if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, **({} if rate == 1 else {"share": rate})}
        for rate, pair in (groups or {1.0: ([], [])}).items()
        for parameters, decay in zip(pair, (0.0, weight_decay), strict=True)
    ]


def make_optimizer(
    model: nn.Module, recipe: Recipe, share: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`."""
    return torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay, share),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,  # the same equations, in one pass over each tensor
    )
