"""One update of the weights: forward and backward over its micro-batches, one step of the optimizer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobileformer.data.loading import Batch
from mobileformer.training.recipe import Recipe
from mobileformer.training.state import TrainingError
from mobileformer.training.world import World

__all__ = ["Outcome", "Update", "mixup_loss"]


def mixup_loss(logits: Tensor, y: Tensor, share: float, smoothing: float) -> Tensor:
    """Mean cross-entropy (nats) where image i is share * image i + (1 - share) * image B - 1 - i.

    logits (B,K), y (B,) int64. Linear in the target, so mixing the losses is mixing the targets.
    """
    loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
    if share == 1.0:
        return loss
    return share * loss + (1 - share) * F.cross_entropy(logits, y.flip(0), label_smoothing=smoothing)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one update, over all processes. stop: somebody was asked to."""

    loss: float
    images: int
    broken: int
    gradient_norm: float
    stop: bool


class Update:
    """Holds what every update needs. `model` is the network itself; with several processes it is wrapped here."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, world: World) -> None:
        self.network = model
        self.optimizer = optimizer
        self.recipe = recipe
        self.world = world
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        runner: nn.Module = torch.compile(model) if recipe.compile else model  # type: ignore[assignment]
        if world.size > 1:
            # Running statistics are averaged where they are used, once an epoch, and not sent around in between.
            newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            no_buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            runner = DistributedDataParallel(runner, gradient_as_bucket_view=True, **no_buffers)
        self.runner = runner

    def __call__(self, batches: Sequence[Batch], rate: float, update: int, *, stop: bool) -> Outcome:
        """The batches of this process, in the order of their slots; `update` counts from the run's start.

        Raises TrainingError, on every process alike, where the loss or the gradient is not finite: the weights are
        then still those of the update before.
        """
        loss_sum, images, bad = 0.0, 0, None
        self.optimizer.zero_grad(set_to_none=True)
        for turn, batch in enumerate(batches):
            last = turn == len(batches) - 1
            with contextlib.nullcontext() if last else self._apart():
                loss = self._forward(batch, update, turn * self.world.size + self.world.rank)
                (loss / len(batches)).backward()
            value = float(loss.detach())
            if not math.isfinite(value) and bad is None:
                bad = batch
            loss_sum += value * len(batch.y)
            images += len(batch.y)
        broken = sum(len(batch.broken) for batch in batches)
        total, count, all_broken, stops = self.world.sum(loss_sum, images, broken, stop)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or math.inf))
        if not math.isfinite(total) or not math.isfinite(norm):
            what = f"the loss is {total / count}" if not math.isfinite(total) else f"the gradient's norm is {norm}"
            where = "" if bad is None else f", in the batch of images {bad.index.tolist()}"
            raise TrainingError(f"update {update}: {what}{where}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return Outcome(total / count, int(count), int(all_broken), norm, stops > 0)

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay in this process: they travel once an update, with its last micro-batch."""
        if isinstance(self.runner, DistributedDataParallel):
            return self.runner.no_sync()
        return contextlib.nullcontext()

    def _forward(self, batch: Batch, update: int, slot: int) -> Tensor:
        """The loss of one micro-batch. All it draws comes from (seed, update, slot), whichever process has the slot."""
        if len(batch.y) < 2:
            raise TrainingError(
                f"update {update}: a batch with {len(batch.y)} image(s) that can be read, BatchNorm needs 2; broken: "
                + "; ".join(batch.broken[:5])
            )
        recipe, device = self.recipe, self.world.device
        rng = np.random.default_rng((recipe.seed, update, slot))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout and stochastic depth
        x, y = batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)
        share = 1.0
        if recipe.mixup > 0:
            share = float(rng.beta(recipe.mixup, recipe.mixup))
            x = torch.lerp(x.flip(0), x, share)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = self.runner(x)
        return mixup_loss(logits.float(), y, share, recipe.label_smoothing)
