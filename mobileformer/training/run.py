"""A training run from data and a recipe to weights on disk, and on from wherever it was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch

import mf_kernels
from mobileformer.data.base import place
from mobileformer.data.loading import evaluation_batches, steps_per_epoch, training_batches
from mobileformer.files.replacing import replacing
from mobileformer.measure.machine import machine
from mobileformer.training.average import Average, estimate_statistics
from mobileformer.training.lock import lock_folder
from mobileformer.training.log import Log, read_log
from mobileformer.training.lookup import named
from mobileformer.training.memory import give_back_free_memory
from mobileformer.training.options import Options
from mobileformer.training.recipe import Recipe, write_recipe
from mobileformer.training.schedule import learning_rate, make_optimizer
from mobileformer.training.sources import check_data
from mobileformer.training.state import (
    Progress,
    TrainingError,
    describe_data,
    load_state,
    previous_of,
    save_state,
)
from mobileformer.training.step import Outcome, Update
from mobileformer.training.stopping import Asked, Interrupted
from mobileformer.training.task import Task
from mobileformer.training.world import World
from mobileformer.visualize.curves import draw_curves

__all__ = ["train"]


def train(
    training: Any,
    validation: Any,
    recipe: Recipe,
    options: Options,
    world: World,
    task: type[Task] | None = None,
) -> dict[str, Any]:
    """Train to the end of the recipe and return the result that is also written as result.json.

    training, validation: sources (mobileformer.data). task: None is the one that the recipe names.

    In `options.output` stand afterwards last.safetensors and best.safetensors, checkpoint.pt, recipe.toml, log.jsonl,
    curves.png, result.json; every one is written whole or not at all.

    Raises TrainingError (nothing to start from, another training in the folder, other data than the checkpoint's,
    broken images, NaN), Interrupted after SIGTERM or SIGINT, and what the task and the sources raise.
    """
    with contextlib.ExitStack() as stack:
        if world.leads:
            options.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(options.output))
        return _Run(task or named(recipe.task), training, validation, recipe, options, world).to_the_end()


class _Run:
    def __init__(
        self, task: type[Task], training: Any, validation: Any, recipe: Recipe, options: Options, world: World
    ) -> None:
        if recipe.slots % world.size:
            raise TrainingError(
                f"global_batch: {recipe.global_batch} images are {recipe.slots} micro-batches of {recipe.micro_batch}, "
                f"which {world.size} processes cannot share evenly"
            )
        check_data(training, validation, recipe)
        self.training, self.validation = training, validation
        self.data = describe_data(training, validation)
        self.options, self.world = options, world
        self.checkpoint = options.output / "checkpoint.pt"
        self.task = task(training, recipe, options.weights, use_fused=options.use_fused)
        self.model, self.recipe = self.task.model, self.task.recipe
        self.steps = steps_per_epoch(training, batch_size=recipe.micro_batch, slots=recipe.slots)
        self.model.to(world.device)
        self.optimizer = make_optimizer(self.model, self.recipe, self.task.rate_share)
        self.average = Average(self.model, recipe.average_decay) if recipe.average_decay else None
        self.progress = Progress()
        self.before: Literal["keep", "damaged", "other"] = "other"  # of the checkpoint that the next one replaces
        self.damaged: str | None = None
        if not options.fresh and (self.checkpoint.exists() or previous_of(self.checkpoint).exists()):
            self._restore()
        world.wait()
        self.update = Update(self.task, self.optimizer, self.recipe, world)
        self.asked = Asked()

    def to_the_end(self) -> dict[str, Any]:
        recipe, progress = self.recipe, self.progress
        if self.world.leads:
            write_recipe(recipe, self.options.output / "recipe.toml")
        self.log = Log(
            self.options.output,
            leads=self.world.leads,
            updates=progress.updates,
            total=self.steps * recipe.total_epochs,
        )
        self.log.write(
            "start", progress.updates, machine=machine(), processes=self.world.size, device=str(self.world.device),
            threads=torch.get_num_threads(), training_images=len(self.training),
            validation_images=len(self.validation), fused=self.options.use_fused, training=place(self.training),
            validation=place(self.validation),
        )  # fmt: skip
        self.log.say(f"training on {place(self.training)}, validation on {place(self.validation)}")
        if self.damaged is not None:
            self.log.say(f"{self.damaged}; going on from the one before, after {progress.updates} updates")
        try:
            with self.asked.listening():
                while progress.epoch < recipe.total_epochs:
                    self._epoch()
            result = self._result()
            if self.world.leads:
                self._draw()
        finally:
            self.log.close()
        if self.world.leads:
            with replacing(self.options.output / "result.json") as temporary:
                temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    def _draw(self) -> None:
        folder, best_by = self.options.output, self.task.best_by
        try:
            draw_curves(
                read_log(folder / "log.jsonl"), folder / "curves.png", loss_unit=self.task.loss_unit,
                score=best_by.key, score_title=best_by.title, score_unit=best_by.unit,
            )  # fmt: skip
        except ImportError:
            self.log.say("matplotlib is not installed (pip install 'mobileformer[train]'): curves.png is not drawn")

    def _epoch(self) -> None:
        recipe, progress, share = self.recipe, self.progress, self.recipe.slots // self.world.size
        self.task.train_mode()
        batches = iter(self._training_batches(progress.epoch, progress.step))
        began = saved = time.monotonic()
        passed, pictures, told = began, 0, progress.step
        while progress.step < self.steps:
            position = progress.epoch + (progress.step / self.steps if recipe.schedule == "step" else 0.0)
            rate = learning_rate(recipe, position)
            group = list(islice(batches, share))
            outcome = self._update(group, rate)
            pictures += outcome.images
            if progress.step % self.options.log_updates == 0 or progress.step == self.steps:
                now = time.monotonic()
                speed = pictures / (now - passed)
                self._tell(outcome, rate, speed, progress.step - told)
                passed, pictures, told = now, 0, progress.step
            if outcome.stop or time.monotonic() - saved > 60 * self.options.save_minutes:
                progress.seconds += time.monotonic() - began
                began = saved = time.monotonic()
                self._save()
                if outcome.stop:
                    raise Interrupted(self.asked.number or signal.SIGTERM, self.checkpoint)
        progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
        if progress.epoch % recipe.evaluate_every == 0 or progress.epoch == recipe.total_epochs:
            self._evaluate()
        progress.seconds += time.monotonic() - began
        self._save()
        if self.asked.number is not None and progress.epoch < recipe.total_epochs:
            raise Interrupted(self.asked.number, self.checkpoint)

    def _update(self, group: list[Any], rate: float) -> Outcome:
        progress = self.progress
        first = progress.updates == 0
        try:
            with mf_kernels.record_kernels() if first else contextlib.nullcontext() as record:
                outcome = self.update(group, rate, progress.updates, stop=self.asked.number is not None)
        except TrainingError as error:
            safe = f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else ""
            raise TrainingError(f"{error}{safe}") from error
        if record is not None:
            self.log.write("kernels", 0, served=dict(record.counts))
            self.log.say("kernels of the first update: " + _in_words(record.counts))
        for batch in group:
            for message in batch.broken:
                self.log.say(f"broken image left out: {message}")
                self.log.write("broken", progress.updates, image=message)
        progress.broken += outcome.broken
        if progress.broken > self.options.max_broken:
            raise TrainingError(
                f"max_broken: {progress.broken} images could not be read, more than {self.options.max_broken}"
            )
        progress.step += 1
        progress.updates += 1
        if progress.updates % 100 == 0:
            give_back_free_memory()
        progress.loss_sum += outcome.loss * outcome.images
        progress.images += outcome.images
        if self.average is not None:
            self.average.update(self.model, progress.updates)
        return outcome

    def _tell(self, outcome: Outcome, rate: float, speed: float, updates: int) -> None:
        progress = self.progress
        self.log.write(
            "train", progress.updates, epochs=progress.epoch + progress.step / self.steps, loss=outcome.loss,
            mean_loss=progress.loss_sum / progress.images, learning_rate=rate, gradient_norm=outcome.gradient_norm,
            images_per_second=speed, **{f"{name}_loss": part for name, part in outcome.parts.items()},
        )  # fmt: skip
        self.log.advance(
            updates,
            {"epoch": str(progress.epoch + 1), "loss": f"{outcome.loss:.3f}", "lr": f"{rate:.2e}",
             "img/s": f"{speed:.0f}"},
        )  # fmt: skip

    def _evaluate(self) -> None:
        """Look at the validation split with the weights that would be shipped, and keep the best."""
        self.world.average_buffers(self.model)
        model = self.model if self.average is None else self._averaged()
        progress, size, best_by = self.progress, self._evaluation_size(), self.task.best_by
        batches = evaluation_batches(
            self.validation, self.task.evaluation_transform(size), batch_size=self.recipe.micro_batch,
            rank=self.world.rank, world=self.world.size, workers=self.options.workers,
        )  # fmt: skip
        with torch.no_grad():
            figures = self.task.score(model.eval(), batches, self.world)
        progress.validation = figures
        epochs = progress.epoch
        self.log.write("validation", progress.updates, epochs=epochs, **figures)
        self.log.say(f"epoch {epochs}: {self.task.in_words(figures)}")
        best = progress.best if progress.best_epoch else math.nan
        better = best_by.is_better(figures[best_by.key], best)
        if self.world.leads:
            for name in ("last.safetensors", "best.safetensors") if better else ("last.safetensors",):
                self.task.save(model, self.options.output / name, size)
        if better:
            progress.best, progress.best_epoch = figures[best_by.key], epochs

    def _averaged(self) -> Any:
        assert self.average is not None
        recipe, model = self.recipe, self.average.model
        count = -(-recipe.average_images // (recipe.micro_batch * self.world.size))
        batches = islice(self._training_batches(self.progress.epoch - 1, 0), count)
        estimate_statistics(model, (batch.x.to(self.world.device) for batch in batches), self.world)
        return model

    def _training_batches(self, epoch: int, start: int) -> Iterator[Any]:
        return training_batches(
            self.training, self.task.training_transform(self.recipe.size_at(epoch)),
            batch_size=self.recipe.micro_batch, slots=self.recipe.slots, epoch=epoch, seed=self.recipe.seed,
            start=start, rank=self.world.rank, world=self.world.size, workers=self.options.workers,
        )  # fmt: skip

    def _save(self) -> None:
        self.world.average_buffers(self.model)
        if self.world.leads:
            average = None if self.average is None else self.average.model.state_dict()
            save_state(
                self.checkpoint,
                self.recipe,
                self.progress,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                average=average,
                data=self.data,
                description={"task": self.task.name, **self.task.describe(self._evaluation_size())},
                before=self.before,
            )
        self.before = "keep"
        self.world.wait()

    def _restore(self) -> None:
        content = load_state(self.checkpoint, self.recipe, self.data, extend=self.options.extend)
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.average is not None:
                self.average.model.load_state_dict(content["average"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrainingError(
                f"{self.checkpoint}: does not hold this network ({str(error).splitlines()[0].rstrip(':')}); give "
                "another output folder, or --fresh to begin again in this one"
            ) from error
        self.progress, self.damaged = content["progress"], content["damaged"]
        self.before = "keep" if self.damaged is None else "damaged"

    def _evaluation_size(self) -> int:
        return self.recipe.evaluation_size_after(max(1, self.progress.epoch))

    def _result(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "variant": self.recipe.variant,
            **{key: value if math.isfinite(value) else None for key, value in progress.validation.items()},
            f"best_{self.task.best_by.key}": progress.best,
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "updates": progress.updates,
            "seconds": progress.seconds,
            "broken_images": progress.broken,
            "training": place(self.training),
            "validation": place(self.validation),
            "processes": self.world.size,
            "machine": machine(),
        }


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items())) or "none of the package's own"
