"""One update of the weights: forward and backward over its micro-batches, one step of the optimizer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobileformer.data.loading import Batch
from mobileformer.training.recipe import Recipe
from mobileformer.training.state import TrainingError
from mobileformer.training.task import Task
from mobileformer.training.world import World

__all__ = ["Outcome", "Update"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one update, over all processes. stop: somebody was asked to. parts: of the loss, where those have names."""

    loss: float
    images: int
    broken: int
    gradient_norm: float
    stop: bool
    parts: dict[str, float] = field(default_factory=dict)


class Update:
    """Holds what every update needs. With several processes the task's network is wrapped here."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, recipe: Recipe, world: World) -> None:
        model = task.model
        self.task = task
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
        part_sums: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for turn, batch in enumerate(batches):
            last = turn == len(batches) - 1
            with contextlib.nullcontext() if last else self._apart():
                loss, parts = self._loss(batch, update, turn * self.world.size + self.world.rank)
                (loss / len(batches)).backward()
            value = float(loss.detach())
            if not math.isfinite(value) and bad is None:
                bad = batch
            loss_sum += value * len(batch.index)
            images += len(batch.index)
            for name, part in parts.items():
                part_sums[name] = part_sums.get(name, 0.0) + float(part.detach()) * len(batch.index)
        broken = sum(len(batch.broken) for batch in batches)
        total, count, all_broken, stops, *sums = self.world.sum(loss_sum, images, broken, stop, *part_sums.values())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or math.inf))
        if not math.isfinite(total) or not math.isfinite(norm):
            what = f"the loss is {total / count}" if not math.isfinite(total) else f"the gradient's norm is {norm}"
            where = "" if bad is None else f", in the batch of images {bad.index.tolist()}"
            raise TrainingError(f"update {update}: {what}{where}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        means = {name: part / count for name, part in zip(part_sums, sums, strict=True)}
        return Outcome(total / count, int(count), int(all_broken), norm, stops > 0, means)

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay in this process: they travel once an update, with its last micro-batch."""
        if isinstance(self.runner, DistributedDataParallel):
            return self.runner.no_sync()
        return contextlib.nullcontext()

    def _loss(self, batch: Batch, update: int, slot: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one micro-batch, and its parts if they have names.

        All that is drawn comes from (seed, update, slot), whichever process has the slot.
        """
        if len(batch.index) < 2:
            raise TrainingError(
                f"update {update}: a batch with {len(batch.index)} image(s) that can be read, BatchNorm needs 2; "
                "broken: " + "; ".join(batch.broken[:5])
            )
        rng = np.random.default_rng((self.recipe.seed, update, slot))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout and stochastic depth
        loss = self.task.loss(self._forward, batch, rng, self.world.device)
        if isinstance(loss, Mapping):
            return torch.stack(list(loss.values())).sum(), loss
        return loss, {}

    def _forward(self, *given: Any) -> Any:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.runner(*given)
