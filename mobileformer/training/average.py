"""The exponential average of a network's parameters, and BatchNorm statistics that fit them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobileformer.training.world import World

__all__ = ["Average", "estimate_statistics"]

Network = TypeVar("Network", bound=nn.Module)


class Average(Generic[Network]):
    """average += (1 - decay) (parameters - average) after every update, with a shorter memory at the start.

    Parameters only. Running statistics belong to the parameters that made them: averaged beside them they fit
    neither, so they are estimated again before the average is used. The decay of update t is
    min(decay, (1 + t) / (10 + t)), or the random initialisation would stay in the average for long.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        weight = 1 - min(self.decay, (1 + updates) / (10 + updates))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, weight)


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor], world: World) -> None:
    """Set every BatchNorm's running mean and variance to the mean over `batches`, and over the processes.

    batches: x (B,C,H,W) of each forward pass. The model is left in evaluation mode.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches since the reset
    try:
        for x in batches:
            model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    world.average_buffers(model)
