"""`mobileformer visualize`: where a network looks, as a picture and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mobileformer.cli import visualize_boxes, visualize_classes
from mobileformer.cli.output import CommandError, JsonOption, command, print_json
from mobileformer.cli.weights import ShortSideOption, WeightsOption, chosen_weights, task_of

__all__ = ["visualize"]

# What is drawn of each task's networks: `run` and `show`.
_ROOMS: dict[str, Any] = {"classification": visualize_classes, "detection": visualize_boxes}


def visualize(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="One image file.")],
    weights: WeightsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT.png", help="The picture; without it and --html, IMAGE-attention.png, here."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="OUT.html", help="The page, which opens offline; of a classifier.")
    ] = None,
    size: ShortSideOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw where the network looks.

    Of a classifier: of each block and head, what each token gathers from and where it is given to. Mobile to Former:
    where a token looks, of weight 1 over all positions. Former to Mobile: which token a position takes from, of weight
    1 over the tokens. Beside them how alike the tokens of a block are. As a PNG, and as one HTML page on which block,
    head and token are chosen.

    The attention is computed by the reference path in plain PyTorch: fused kernels never hold it in memory.

    Of an end-to-end detector: where each of the surest queries looks in the last read of the image, the point that it
    begins from, and its box. RetinaNet has no queries: its boxes are drawn.
    """
    with command(as_json):
        task = task_of(weights, None)
        room = _ROOMS.get(task, visualize_classes)  # which says of a file that it is of another task
        weights = chosen_weights(weights, task)
        if out is None and page is None:
            out = Path(f"{image.stem}-attention.png")
        _check_targets(out, page, image, weights)
        report = room.run(image, weights, out, page, size)
        if as_json:
            print_json(report)
        else:
            room.show(report)


def _check_targets(out: Path | None, page: Path | None, image: Path, weights: Path) -> None:
    for option, path, suffix in (("--out", out, ".png"), ("--html", page, ".html")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise typer.BadParameter(f"{path}: expected the ending {suffix}", param_hint=option)
        if path.resolve() in (image.resolve(), weights.resolve()):
            raise typer.BadParameter(f"{path}: is what is read", param_hint=option)
        if not path.absolute().parent.is_dir():
            raise CommandError(f"{option} {path}: the folder {path.parent} does not exist")
