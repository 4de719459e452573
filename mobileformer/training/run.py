"""A training run from data and a recipe to weights on disk, and on from wherever it was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mf_kernels
from mobileformer.data.base import place
from mobileformer.data.loading import evaluation_batches, steps_per_epoch, training_batches
from mobileformer.evaluation.accuracy import ranks_of
from mobileformer.files.replacing import replacing
from mobileformer.measure.machine import machine
from mobileformer.models import Model
from mobileformer.training.average import Average, estimate_statistics
from mobileformer.training.curves import draw_curves
from mobileformer.training.lock import lock_folder
from mobileformer.training.log import Log
from mobileformer.training.memory import give_back_free_memory
from mobileformer.training.prepare import (
    check_data,
    evaluation_transform,
    make_model,
    normalisation,
    training_transform,
)
from mobileformer.training.recipe import Recipe, write_recipe
from mobileformer.training.schedule import learning_rate, make_optimizer
from mobileformer.training.state import (
    Progress,
    TrainingError,
    describe_data,
    load_state,
    previous_of,
    save_state,
)
from mobileformer.training.step import Outcome, Update
from mobileformer.training.world import World
from mobileformer.weights.load import save_weights

__all__ = ["Interrupted", "Options", "train"]


class Interrupted(Exception):
    """The run was asked to stop, by the signal of this number, and is saved."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {path} is where the same command goes on")
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a run, what does not change its numbers.

    ==============  ===========================================================================================
    output          folder of everything the run writes; created if need be
    weights         initial weights; a classifier for another number of classes starts anew
    use_fused       the fused operators, or plain PyTorch
    workers         processes that load images; 0 is the training process itself
    save_minutes    between two checkpoints inside an epoch
    max_broken      images that may be unreadable before the run ends
    fresh           begin again where the folder holds a run
    extend          go on with a run whose recipe had other `epochs` or `cooldown_epochs`; the learning rate is that of
                    the longer recipe from there on
    log_updates     updates between two lines of the log
    ==============  ===========================================================================================
    """

    output: Path
    weights: Path | None = None
    use_fused: bool = True
    workers: int = 0
    save_minutes: float = 10.0
    max_broken: int = 100
    fresh: bool = False
    extend: bool = False
    log_updates: int = 20


def train(training: Any, validation: Any, recipe: Recipe, options: Options, world: World) -> dict[str, Any]:
    """Train to the end of the recipe and return the result that is also written as result.json.

    training, validation: sources (mobileformer.data). In `options.output` stand afterwards last.safetensors and
    best.safetensors, checkpoint.pt, recipe.toml, log.jsonl, curves.png, result.json; every one is written whole or
    not at all.

    Raises TrainingError (nothing to start from, another training in the folder, other data than the checkpoint's,
    broken images, NaN), Interrupted after SIGTERM or SIGINT, and what
    the sources raise.
    """
    with contextlib.ExitStack() as stack:
        if world.leads:
            options.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(options.output))
        return _Run(training, validation, recipe, options, world).to_the_end()


class _Run:
    def __init__(self, training: Any, validation: Any, recipe: Recipe, options: Options, world: World) -> None:
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
        self.model, self.recipe = make_model(training, recipe, options.weights, use_fused=options.use_fused)
        self.mean, self.std = normalisation(self.recipe, training)
        self.steps = steps_per_epoch(training, batch_size=recipe.micro_batch, slots=recipe.slots)
        self.model.to(world.device)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.average = Average(self.model, recipe.average_decay) if recipe.average_decay else None
        self.progress = Progress()
        self.before: Literal["keep", "damaged", "other"] = "other"  # of the checkpoint that the next one replaces
        self.damaged: str | None = None
        if not options.fresh and (self.checkpoint.exists() or previous_of(self.checkpoint).exists()):
            self._restore()
        world.wait()
        self.update = Update(self.model, self.optimizer, self.recipe, world)
        self.signal: int | None = None

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
            with self._signals():
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
        try:
            draw_curves(self.options.output / "log.jsonl", self.options.output / "curves.png")
        except ImportError:
            self.log.say("matplotlib is not installed (pip install 'mobileformer[train]'): curves.png is not drawn")

    def _epoch(self) -> None:
        recipe, progress, share = self.recipe, self.progress, self.recipe.slots // self.world.size
        self._train_mode()
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
                    raise Interrupted(self.signal or signal.SIGTERM, self.checkpoint)
        progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
        if progress.epoch % recipe.evaluate_every == 0 or progress.epoch == recipe.total_epochs:
            self._evaluate()
        progress.seconds += time.monotonic() - began
        self._save()
        if self.signal is not None and progress.epoch < recipe.total_epochs:
            raise Interrupted(self.signal, self.checkpoint)

    def _update(self, group: list[Any], rate: float) -> Outcome:
        progress = self.progress
        first = progress.updates == 0
        try:
            with mf_kernels.record_kernels() if first else contextlib.nullcontext() as record:
                outcome = self.update(group, rate, progress.updates, stop=self.signal is not None)
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
            images_per_second=speed,
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
        top1, top5, loss = self._accuracy(model.eval())
        progress = self.progress
        progress.validation = {"top1": top1, "top5": top5, "loss": loss}
        epochs = progress.epoch
        self.log.write("validation", progress.updates, epochs=epochs, top1=top1, top5=top5, loss=loss)
        self.log.say(f"epoch {epochs}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}")
        if self.world.leads:
            self._save_weights(model, "last.safetensors")
            if top1 > progress.best:
                self._save_weights(model, "best.safetensors")
        if top1 > progress.best:
            progress.best, progress.best_epoch = top1, epochs

    def _averaged(self) -> Model:
        assert self.average is not None
        recipe, model = self.recipe, self.average.model
        count = -(-recipe.average_images // (recipe.micro_batch * self.world.size))
        batches = islice(self._training_batches(self.progress.epoch - 1, 0), count)
        estimate_statistics(model, (self._on_device(batch.x) for batch in batches), self.world)
        return model

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.world.device)

    @torch.no_grad()
    def _accuracy(self, model: Model) -> tuple[float, float, float]:
        """Top-1 and top-5 in per cent, and the mean loss in nats, over the whole validation split."""
        transform = evaluation_transform(self.recipe, self.mean, self.std, self._evaluation_size())
        first = fifth = loss = images = 0.0
        for batch in evaluation_batches(
            self.validation, transform, batch_size=self.recipe.micro_batch, rank=self.world.rank,
            world=self.world.size, workers=self.options.workers,
        ):  # fmt: skip
            y = batch.y.to(self.world.device)
            logits = model(self._on_device(batch.x)).float()
            ranks = ranks_of(logits, y)
            first += float((ranks < 1).sum())
            fifth += float((ranks < 5).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            images += len(y)
        first, fifth, loss, images = self.world.sum(first, fifth, loss, images)
        if not images:
            raise TrainingError("validation: not one image could be read")
        return 100 * first / images, 100 * fifth / images, loss / images

    def _training_batches(self, epoch: int, start: int) -> Iterator[Any]:
        return training_batches(
            self.training, training_transform(self.recipe, self.mean, self.std, self.recipe.size_at(epoch)),
            batch_size=self.recipe.micro_batch, slots=self.recipe.slots, epoch=epoch, seed=self.recipe.seed,
            start=start, rank=self.world.rank, world=self.world.size, workers=self.options.workers,
        )  # fmt: skip

    def _train_mode(self) -> None:
        self.model.train()
        if self.recipe.freeze:
            self.model.eval()
            self.model.head.train()

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
                description=self._description(),
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

    def _save_weights(self, model: Model, name: str) -> None:
        save_weights(model, self.options.output / name, **self._told())

    def _told(self) -> dict[str, Any]:
        """What the weights say of themselves, as `save_weights` takes it."""
        return {
            "labels": list(self.training.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": self._evaluation_size(),
            "crop_fraction": self.recipe.crop_fraction,
        }

    def _description(self) -> dict[str, Any]:
        model = self.model
        network = {"variant": model.variant, "num_classes": model.num_classes, "in_chans": model.in_chans}
        return {**network, "spatial_dynamic_relu": model.spatial_dynamic_relu, **self._told()}

    def _evaluation_size(self) -> int:
        return self.recipe.evaluation_size_after(max(1, self.progress.epoch))

    def _result(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "variant": self.model.variant,
            **{key: value if math.isfinite(value) else None for key, value in progress.validation.items()},
            "best_top1": progress.best,
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

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the update at hand, then the run; a second one ends it at once."""

        def ask(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items())) or "none of the package's own"
