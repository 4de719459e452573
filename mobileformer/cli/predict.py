"""`mobileformer predict`: classes and probabilities of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.answers import AnswerFile, AnswerTable, classify, run_key
from mobileformer.cli.output import (
    MAX_BATCH,
    MAX_THREADS,
    MAX_WORKERS,
    CommandError,
    DeviceOption,
    Document,
    JsonOption,
    check_device,
    check_memory,
    command,
    note,
    print_json,
    progress,
)
from mobileformer.cli.weights import SizeOption, WeightsOption, chosen_weights, input_view, read_labels

if TYPE_CHECKING:
    from mobileformer import Metadata

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
        metadata, path, device, network = _open(weights, device, fused, precision, threads)
        names = read_labels(labels, metadata.num_classes) if labels is not None else metadata.labels
        view = input_view(metadata, weights, size)
        check_memory(view.size, batch, channels=metadata.in_chans)
        told = {
            "weights": str(weights),
            "variant": metadata.variant,
            "device": device,
            "fused": path != "plain",
            "path": path,
            "precision": precision,
            "size": view.size,
            "crop_fraction": view.crop_fraction,
        }
        sink: AnswerFile | AnswerTable | Document
        if output is not None:
            sink = AnswerFile(output, run_key(weights, view, names, top_k, told["fused"], precision))
        elif document.wanted:
            sink = document
            document.begin(told, "results")
        else:
            sink = AnswerTable(has_names=names is not None)
        before = sink.answered if isinstance(sink, AnswerFile) else {}
        count, failed = len(before), sum(before.values())
        if before:
            note(f"{output}: goes on after {count} answers")
        document.tail["failed"] = failed
        with closing(sink), _threads(threads):
            answers = classify(
                network, _to_do(images, before), view=view, names=names, top_k=top_k, batch=batch, workers=workers
            )
            for answer in answers:
                count += 1
                if "error" in answer:
                    note(f"error: {answer['error']}")
                    document.tail["failed"] = failed = failed + 1
                sink.add(answer)
        if sink is document:
            document.end()
        elif as_json:
            print_json({**told, "output": str(output), "answers": count, "failed": failed})
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


def _to_do(images: list[str], before: dict[str, bool]) -> Iterator[tuple[str, str | None]]:
    """The images that have no answer yet, with a bar for whoever watches."""
    from mobileformer.data import find_images

    return ((name, problem) for name, problem in progress(find_images(images), "images") if name not in before)


def _open(
    weights: Path, device: str, fused: bool | None, precision: str, threads: int | None
) -> tuple[Metadata, str, str, Callable[[Any], Any]]:
    """What the file says of itself, which path computes, where, and the function from images to logits."""
    import torch

    from mobileformer.cli.networks import EngineError, is_folded, open_networks

    folded = is_folded(weights)
    device = check_device("cpu" if folded and device == "auto" else device)
    path = "engine" if folded or (fused is None and device == "cpu") else "plain" if fused is False else "fused"
    if folded and fused is not None:
        raise CommandError(f"{weights}: is folded for inference, only the engine runs it, not --fused or --no-fused")
    if precision == "bfloat16" and not path.startswith("engine") and (path == "plain" or device == "cpu"):
        raise typer.BadParameter("is for the inference engine, or fused on a GPU", param_hint="--precision bfloat16")
    chosen = path + ("-bf16" if precision == "bfloat16" else "")
    count = threads or torch.get_num_threads()
    try:
        metadata, networks = open_networks(weights, (chosen,), device, count)
    except EngineError as error:
        if folded or precision == "bfloat16":
            raise
        note(f"fused PyTorch computes in place of the engine: {error}")
        path = chosen = "fused"
        metadata, networks = open_networks(weights, (chosen,), device, count)
    return metadata, path, device, networks[chosen]


def _threads(threads: int | None) -> AbstractContextManager[None]:
    from mobileformer.inference.threads import thread_count

    return nullcontext() if threads is None else thread_count(threads)
