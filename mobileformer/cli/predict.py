"""`mobileformer predict`: classes and probabilities of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.output import (
    JsonOption,
    check_device,
    command,
    note,
    print_json,
    print_table,
    progress,
)
from mobileformer.cli.weights import (
    InputView,
    SizeOption,
    WeightsOption,
    chosen_weights,
    input_view,
    open_metadata,
    open_model,
    read_labels,
)

if TYPE_CHECKING:
    import numpy as np

    from mobileformer import Model

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
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the network runs.")] = "cpu",
    fused: Annotated[bool, typer.Option("--fused/--no-fused", help="Fused operators, or plain PyTorch.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images in one call of the network.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Classify images: the most probable classes of each.

    Resize the short side to size over crop fraction, crop the centre, normalise, all as the weight file says. One
    that does not say gets size 224 and crop fraction 0.875.
    Transparent pixels count as white. A bad file is reported and the rest is done; the exit code is then 1.
    """
    with command(as_json):
        weights = chosen_weights(weights)
        check_device(device)
        metadata = open_metadata(weights)
        names = read_labels(labels, metadata.num_classes) if labels is not None else metadata.labels
        view = input_view(metadata, weights, size)
        model = open_model(weights, use_fused=fused).to(device)
        answers = _classify(model, images, batch=batch, view=view, top_k=top_k)
        results = []
        for answer in answers:
            for row in answer.get("predictions", ()):
                row["label"] = names[row["class"]] if names else None
            if "error" in answer:
                note(f"error: {answer['error']}")
            results.append(answer)
        failed = sum("error" in answer for answer in results)
        if as_json:
            print_json(
                {
                    "weights": str(weights),
                    "variant": metadata.variant,
                    "device": device,
                    "fused": fused,
                    "size": view.size,
                    "crop_fraction": view.crop_fraction,
                    "failed": failed,
                    "results": results,
                }
            )
        else:
            _show(results, has_names=names is not None)
        if failed:
            note(f"{failed} of {len(results)} failed")
            raise typer.Exit(1)


def _classify(
    model: Model,
    arguments: list[str],
    *,
    batch: int,
    view: InputView,
    top_k: int,
) -> Iterator[dict[str, Any]]:
    """{"image", "predictions"} or {"image", "error"} for every image, in order; batch by batch."""
    from mobileformer.data import ImageError, find_images, load_image

    found = list(find_images(arguments))
    bar = progress(found, "images", total=len(found))
    for group in _batched(bar, batch):
        answers: list[dict[str, Any]] = []
        arrays = []
        for name, problem in group:
            answers.append({"image": name})
            try:
                if problem is not None:
                    raise ImageError(problem)
                arrays.append(load_image(name, **asdict(view)))
            except ImageError as error:
                answers[-1]["error"] = str(error)
        good = [answer for answer in answers if "error" not in answer]
        for answer, outcome in zip(good, _run(model, arrays, top_k), strict=True):
            answer.update(outcome)
            if "error" in outcome:
                answer["error"] = f"{answer['image']}: {outcome['error']}"
        yield from answers


def _run(model: Model, arrays: list[np.ndarray], top_k: int) -> Iterator[dict[str, Any]]:
    import numpy as np
    import torch

    if not arrays:
        return
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.stack(arrays)).to(model.tokens.device)).double().cpu()
    for row in logits:
        if not bool(torch.isfinite(row).all()):
            yield {"error": "the network's answer is not finite, so there is no class to name"}
            continue
        top = row.softmax(0).topk(min(top_k, len(row)))
        yield {
            "predictions": [
                {"class": index, "probability": probability}
                for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        }


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _show(results: list[dict[str, Any]], *, has_names: bool) -> None:
    rows = [
        (
            answer["image"] if rank == 0 else "",
            row["class"],
            row["label"],
            f"{100 * row['probability']:.2f} %",
        )
        for answer in results
        for rank, row in enumerate(answer.get("predictions", ()))
    ]
    if not rows:
        return
    if has_names:
        print_table("", ("image", "class", "name", "probability"), rows)
    else:
        print_table("", ("image", "class", "probability"), [(a, b, d) for a, b, _, d in rows])
