"""`mobileformer evaluate`: how right weights are on a split of a data set, of whatever task they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mobileformer.cli import evaluate_boxes, evaluate_classes
from mobileformer.cli.output import (
    MAX_BATCH,
    MAX_THREADS,
    MAX_WORKERS,
    DeviceOption,
    JsonOption,
    check_device,
    command,
    note,
    print_json,
)
from mobileformer.cli.weights import ShortSideOption, WeightsOption, check_threads_option, chosen_weights, task_of

__all__ = ["evaluate"]

# How each task is evaluated and shown: `BATCH`, `run`, `show` and `complaints`.
_ROOMS: dict[str, Any] = {"classification": evaluate_classes, "detection": evaluate_boxes}
_UNSET = (None, False, "float32")  # what an option is that nobody gave


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Image folder, folder of IDX files, shards, or images with boxes, as for train."
        ),
    ],
    weights: WeightsOption = None,
    task: Annotated[
        Literal["classification", "detection"] | None,
        typer.Option(help="What the weights are for.", show_default="what their file says"),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test", "all"], typer.Option(help="Which images; all: of class folders alone.")
    ] = "val",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_BATCH, help="Images in one call of the network.", show_default="64, of a detector 8"
        ),
    ] = None,
    size: ShortSideOption = None,
    path: Annotated[
        Literal["fused", "plain", "engine", "engine-bf16"] | None,
        typer.Option(
            help="What computes: fused operators, plain PyTorch, the inference engine.",
            show_default="the engine on the CPU, else fused",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the engine's matrix products, or of the network on a GPU."),
    ] = "float32",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run plain, fused and engine on the same batches: do they agree?")
    ] = False,
    confusion: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the confusion matrix, of a classifier.")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw precision over recall, of a detector.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the weights' classes in order, in place of the file's own."),
    ] = None,
    device: DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(min=0, max=MAX_WORKERS, help="Processes that load images.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads; else PyTorch's choice.")
    ] = None,
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images before it ends.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Measure weights on a split of a data set: a classifier's top-1 and top-5 accuracy, a detector's AP; by class too.

    Images are counted, nothing is averaged over batches, so the batch size decides speed alone. Images are resized and
    cropped as the weights were trained for. The data's classes are matched with the weights' by name.

    AP, AP50 and AP75 are COCO's, between 0 and 1, of the 100 surest boxes of an image.

    With --compare the exit code is 1 where the paths differ by more than rounding.
    """
    with command(as_json):
        name = task_of(weights, task)
        name = name if name in _ROOMS else "classification"  # which says of a file that it is of another
        of_task: dict[str, dict[str, Any]] = {
            "classification": {"path": path, "precision": precision, "compare": compare, "confusion": confusion},
            "detection": {"curves": curves},
        }
        for other, options in of_task.items():
            for option, value in options.items():
                if other != name and value not in _UNSET:
                    raise typer.BadParameter(f"is for {other}, these weights are for {name}", param_hint=f"--{option}")
        weights = chosen_weights(weights, name)
        check_threads_option(threads)
        room = _ROOMS[name]
        report = room.run(
            data, weights, split=split, batch=batch or room.BATCH, size=size, labels=labels,
            device=check_device(device), workers=workers, threads=threads, max_broken=max_broken, **of_task[name],
        )  # fmt: skip
        if as_json:
            print_json(report)
        else:
            room.show(report)
        wrong = room.complaints(report)
        for line in wrong:
            note(f"error: {line}")
        if wrong:
            raise typer.Exit(1)
