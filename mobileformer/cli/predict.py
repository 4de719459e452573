"""`mobileformer predict`: classes and probabilities of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.answers import AnswerTable
from mobileformer.cli.output import (
    MAX_BATCH,
    MAX_THREADS,
    MAX_WORKERS,
    CommandError,
    DeviceOption,
    JsonOption,
    check_device,
    check_memory,
    command,
    note,
    print_json,
    progress,
)
from mobileformer.cli.weights import (
    SizeOption,
    WeightsOption,
    check_threads_option,
    chosen_weights,
    open_predictor,
    read_labels,
)

if TYPE_CHECKING:
    from mobileformer.prediction import Answer, AnswerFile, Picture, Predictor

__all__ = ["predict"]


def predict(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders (searched to the bottom), patterns."),
    ],
    weights: WeightsOption = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: one a line, or a list in a .json file.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    fused: Annotated[
        bool | None,
        typer.Option(
            "--fused/--no-fused",
            help="Fused operators of PyTorch, or plain PyTorch; else on the CPU the inference engine.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the engine's matrix products, or of the network on a GPU."),
    ] = "float32",
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images in one call of the network.")] = 16,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of the network; else PyTorch's choice.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=MAX_WORKERS, help="Threads that read images ahead of the network.")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.jsonl", help="Write a line an image here; the same command goes on where it stopped."
        ),
    ] = None,
    as_json: JsonOption = False,
    as_lines: Annotated[
        bool, typer.Option("--jsonl", help="A JSON line an image on standard output, as soon as it is known.")
    ] = False,
) -> None:
    """Classify images: the most probable classes of each.

    Resize the short side to size over crop fraction, crop the centre, normalise, all as the weight file says. One
    that does not say gets size 224 and crop fraction 0.875.
    Transparent pixels count as white. A bad file is reported and the rest is done; the exit code is then 1.

    Answers are written while it runs: Ctrl-C leaves those that there are, and with --json a whole document.
    """
    with command(as_json or as_lines, lines=as_lines) as document:
        _check_options(output, as_json=as_json, as_lines=as_lines)
        weights = chosen_weights(weights)
        check_threads_option(threads)
        predictor = _open(
            weights, device, fused, size=size, top_k=top_k, precision=precision, threads=threads, workers=workers,
            batch=batch,
        )  # fmt: skip
        metadata, view, network = predictor.metadata, predictor.view, predictor.network
        if labels is not None:
            predictor.labels = read_labels(labels, metadata.num_classes)
        check_memory(view.size, batch, channels=metadata.in_chans)
        told = {
            "weights": str(weights),
            "variant": metadata.variant,
            "device": network.device,
            "fused": network.path != "plain",
            "path": network.path,
            "precision": precision,
            "size": view.size,
            "crop_fraction": view.crop_fraction,
        }
        kept, table = None, AnswerTable(has_names=predictor.labels is not None)
        add: Callable[[Answer], None] = table.add
        if output is not None:
            kept = _kept(output, weights, view, predictor.labels, top_k, told["fused"], precision)
            add = partial(_keep, kept)
        elif document.wanted:
            document.begin(told, "results")
            add = lambda answer: document.add(answer.row())  # noqa: E731
        before = {} if kept is None else kept.answered
        count, failed = len(before), sum(before.values())
        if before:
            note(f"{output}: goes on after {count} answers")
        document.tail["failed"] = failed
        with closing(kept or table):
            for answer in predictor(_to_do(images, before)):
                count += 1
                if answer.error is not None:
                    note(f"error: {answer.error}")
                    document.tail["failed"] = failed = failed + 1
                add(answer)
        if kept is not None and as_json:
            print_json({**told, "output": str(output), "answers": count, "failed": failed})
        elif kept is None and document.wanted:
            document.end()
        if failed:
            if count > 1:
                note(f"{failed} of {count} failed")
            raise typer.Exit(1)


def _check_options(output: Path | None, *, as_json: bool, as_lines: bool) -> None:
    if as_lines and (as_json or output is not None):
        raise typer.BadParameter("is another form of --json and of --output; give one", param_hint="--jsonl")
    if output is None:
        return
    if output.suffix.lower() != ".jsonl":
        raise typer.BadParameter(f"{output}: expected the ending .jsonl", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: the folder {output.parent} does not exist")


def _to_do(images: list[str], before: dict[str, bool]) -> Iterator[Picture]:
    """The images that have no answer yet, with a bar for whoever watches."""
    from mobileformer.prediction import pictures_in

    return (picture for picture in progress(pictures_in(images), "images") if picture.name not in before)


def _open(weights: Path, device: str, fused: bool | None, **options: Any) -> Predictor:
    """The predictor that the options ask for."""
    from mobileformer.prediction import is_folded

    folded = is_folded(weights)
    device = check_device("cpu" if folded and device == "auto" else device)
    if folded and fused is not None:
        raise CommandError(f"{weights}: is folded for inference, only the engine runs it, not --fused or --no-fused")
    path = None if fused is None else "fused" if fused else "plain"
    return open_predictor(weights, path=path, device=device, **options)


def _kept(output: Path, weights: Path, *told: object) -> AnswerFile:
    """The file of answers, which goes on where this run was stopped. Raises CommandError."""
    from mobileformer.files.reading import NotRegularError
    from mobileformer.prediction import AnswerFile, AnswerFileError, run_key

    try:
        run = run_key(weights, *told)
    except OSError as error:
        raise CommandError(f"{weights}: {error.strerror}") from error
    try:
        return AnswerFile(output, run)
    except AnswerFileError as error:
        raise CommandError(f"--output {error}") from error
    except NotRegularError as error:
        why = "expected a file, found a device or pipe; --jsonl writes to one"
        raise CommandError(f"--output {output}: {why}") from error
    except OSError as error:
        raise CommandError(f"--output {output}: {error.strerror}") from error


def _keep(kept: AnswerFile, answer: Answer) -> None:
    try:
        kept.add(answer)
    except OSError as error:
        raise CommandError(f"--output {kept.path}: {error.strerror}") from error
