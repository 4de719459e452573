"""`mobileformer train`: a recipe, a data set, weights on disk. One process, or as many as torchrun starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mobileformer.cli.output import (
    MAX_THREADS,
    MAX_WORKERS,
    CommandError,
    DeviceOption,
    JsonOption,
    check_device,
    command,
    note,
    print_json,
    print_table,
)

__all__ = ["train"]

_JSON_ONLY = ("updates", "broken_images", "training", "processes", "machine")  # of a result; the table has the rest


def _number(value: float) -> float:
    if value != value:  # NaN, which no bound excludes
        raise typer.BadParameter("expected a number")
    return value


def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Image folder (train/ and val/ by class, or class folders alone), IDX files, webdataset shards, or "
            "images with boxes in COCO's format.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the run's files go, and where it goes on from.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A shipped recipe (26m ... 508m, fashion-mnist, finetune, retinanet-tiny, ...), or a .toml.",
            show_default="the detector's for COCO",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task that the recipe has to be of.", show_default="any")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(metavar="NAME", help="retinanet or end-to-end: as --set detector=NAME.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the recipe; may be repeated."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Initial weights; another number of classes starts anew.")
    ] = None,
    device: DeviceOption = "cpu",
    fused: Annotated[bool, typer.Option("--fused/--no-fused", help="Fused operators, or plain PyTorch.")] = True,
    workers: Annotated[
        int, typer.Option(min=0, max=MAX_WORKERS, help="Processes that load images, for each that trains.")
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of a process; else PyTorch's choice.")
    ] = None,
    save_minutes: Annotated[
        float, typer.Option(min=0, max=1e6, callback=_number, help="Between checkpoints inside an epoch.")
    ] = 10.0,
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images before the run ends.")] = 100,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again where DIR holds a run.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with DIR's run where epochs or cooldown_epochs are set higher.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network. The same command goes on with a run that was stopped, at the very update.

    On several processes or machines: torchrun --nproc-per-node 8 -m mobileformer train ... , with --device cuda each on
    its own GPU. The images of one update,
    and so the numbers, depend on the recipe alone, not on the processes that share them.

    Ctrl-C and SIGTERM save first. The exit code is then 128 plus the signal's number.
    """
    with command(as_json):
        device = check_device(device)
        if recipe is None:
            if detector is None:
                raise typer.BadParameter("expected the name of a recipe", param_hint="--recipe")
            recipe = f"{detector}-coco"
        values = [*(values or []), *([] if detector is None else [f"detector={detector}"])]
        result = _train(
            data, recipe, task, output, values, weights, device, fused=fused, workers=workers, threads=threads,
            save_minutes=save_minutes, max_broken=max_broken, fresh=fresh, extend=extend,
        )  # fmt: skip
        if result is None:
            return
        if as_json:
            print_json({"output": str(output), **result})
        else:
            shown = {key: value for key, value in result.items() if key not in _JSON_ONLY}
            rows = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in shown.items()]
            print_table(str(output), ("what", "is"), rows)


def _train(
    data: str, name: str, task: str | None, output: Path, values: list[str], weights: Path | None, device: str, *,
    fused: bool, workers: int, threads: int | None, save_minutes: float, max_broken: int, fresh: bool,
    extend: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """The result, or None in any process but the first."""
    import torch

    from mobileformer import tasks
    from mobileformer.data import open_source
    from mobileformer.training import Interrupted, Options, TrainingError, join, read_recipe, train

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        recipe = read_recipe(name, values)
        if task not in (None, recipe.task):
            raise CommandError(f"--task {task}: the recipe {name} is for {recipe.task}")
        channels = len(recipe.mean) or None
        training = open_source(data, "train", channels=channels)
        validation = open_source(data, "val", channels=channels)
        options = Options(
            output=output, weights=weights, use_fused=fused, workers=workers, save_minutes=save_minutes,
            max_broken=max_broken, fresh=fresh, extend=extend,
        )  # fmt: skip
        with join(device) as world:
            result = train(training, validation, recipe, options, world, tasks.of(recipe.task))
            return result if world.leads else None
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            note(str(stopped))
        raise typer.Exit(128 + stopped.number) from None
    except (TrainingError, ImportError, OSError, ValueError) as error:
        raise CommandError(str(error)) from error
