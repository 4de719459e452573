"""`mobileformer evaluate` of a detector: COCO's average precision on a split of a data set."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from mobileformer.cli.output import CommandError, note, print_table, progress
from mobileformer.cli.weights import open_detector, read_labels, warnings_told

if TYPE_CHECKING:
    from mobileformer.data.batch import Batch
    from mobileformer.data.coco import CocoSource
    from mobileformer.evaluation.precision import Detections, Precision
    from mobileformer.prediction import DetectionPredictor

__all__ = ["BATCH", "complaints", "run", "show"]

BATCH = 8  # images of 800 x 1333 pixels are forty times as large as a classifier's
MOST = 10  # broken images that are shown; --json has all


def run(
    data: str, weights: Path, *, split: Literal["train", "val", "test", "all"], batch: int, size: int | None,
    labels: Path | None, device: str, workers: int, threads: int | None, max_broken: int, curves: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """What `--json` prints. Raises CommandError, and BadParameter for a picture that is no PNG."""
    import torch

    from mobileformer.data import DataError, evaluation_batches
    from mobileformer.data.base import place
    from mobileformer.evaluation.classes import EvaluationError
    from mobileformer.evaluation.precision import Detections, average_precision

    _check_target(curves)
    predictor = open_detector(weights, size=size, device=device, threads=threads, batch=batch)
    metadata = predictor.metadata
    if labels is not None:
        predictor.labels = read_labels(labels, metadata.num_classes)
    try:
        average_precision(Detections(1))  # what it needs is missing before the work, or not at all
        source = _boxed(data, split, metadata.in_chans)
        order = _order(source, predictor)
        loaded = evaluation_batches(source, predictor.transform, batch_size=batch, workers=workers)
        start = time.perf_counter()
        found, broken = _found(predictor, _watched(loaded, len(source)), order, max_broken)
        precision = average_precision(found)
        seconds = time.perf_counter() - start
    except EvaluationError as error:
        raise CommandError(f"{data}: {error}") from error
    except (DataError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    names = predictor.names
    if predictor.labels is None:
        placed = dict(zip(order, source.classes, strict=True))
        names = [placed.get(index, name) for index, name in enumerate(names)]
    told = {
        "data": data,
        "data_sha256": source.digest(),
        "split": split,
        "weights": str(weights),
        "weights_sha256": _sha256(weights),
        "task": metadata.task,
        "detector": predictor.detector,
        "variant": metadata.variant,
        "parameters": sum(parameter.numel() for parameter in predictor.model.parameters()),
        "size": predictor.size,
        "batch": batch,
        "device": device,
        "threads": threads or torch.get_num_threads(),
        "images_from": place(source),
        "classes_named_by": "--labels" if labels else "weights" if metadata.labels else "data",
        **precision.as_json(names),
        "seconds": seconds,
        "images_per_second": precision.images / seconds,
        "broken": broken,
        "annotations_left_out": source.problems.count,
    }
    if curves is not None:
        _draw(curves, precision, names, told)
        told["curves"] = str(curves)
    return told


def complaints(report: dict[str, Any]) -> list[str]:
    """What makes the exit code 1: nothing, a figure is a figure."""
    return []


def _check_target(curves: Path | None) -> None:
    if curves is None:
        return
    if curves.suffix.lower() != ".png":
        raise typer.BadParameter(f"{curves}: expected the ending .png", param_hint="--curves")
    if not curves.absolute().parent.is_dir():
        raise CommandError(f"--curves {curves}: the folder {curves.parent} does not exist")


def _boxed(data: str, split: Literal["train", "val", "test", "all"], channels: int) -> CocoSource:
    """The split; what is broken in its annotations is told. Raises CommandError for images without boxes."""
    from mobileformer.data import open_source, sources
    from mobileformer.data.coco import CocoSource

    with warnings_told(sources.__name__):
        source = open_source(data, split, channels=channels, partial=True)
    if not isinstance(source, CocoSource):
        raise CommandError(f"{data}: has no boxes, expected annotations in COCO's format")
    return source


def _order(source: CocoSource, predictor: DetectionPredictor) -> list[int]:
    """The position of each of the data's classes among the weights'. Classes without a box here may be unknown.

    Raises EvaluationError as `order_of_classes`.
    """
    from mobileformer.evaluation.classes import order_of_classes

    labels: set[int] = set()
    for index in range(len(source)):
        target = source.target(index)
        labels.update(target["labels"].tolist(), target["crowd_labels"].tolist())
    present = {source.classes[label] for label in labels}
    return order_of_classes(source.classes, predictor.labels, predictor.metadata.num_classes, present=present)


def _found(
    predictor: DetectionPredictor, batches: Iterator[Batch], order: Sequence[int], max_broken: int
) -> tuple[Detections, list[str]]:
    """Everything that is found and everything that is there, under the weights' labels; and what is broken."""
    import numpy as np

    from mobileformer.evaluation.classes import Broken, EvaluationError
    from mobileformer.evaluation.precision import Detections

    found, broken, places = Detections(predictor.metadata.num_classes), Broken(max_broken), np.asarray(order)
    for batch in batches:
        broken.add(batch.broken)
        if not len(batch.index):
            continue
        y = batch.y
        y.truths = [
            {**truth, "labels": places[truth["labels"]], "crowd_labels": places[truth["crowd_labels"]]}
            for truth in y.truths
        ]
        try:
            answers = predictor.find(batch.x, y.sizes)
        except ValueError as error:  # an image that becomes too narrow, or what no number came of
            raise EvaluationError(f"images {batch.index[0]} to {batch.index[-1]}: {error}") from error
        found.add_batch(batch, answers)
    if not len(found):
        raise EvaluationError(f"no image to evaluate on: all {len(broken.messages)} are broken")
    return found, broken.messages


def _watched(batches: Iterator[Batch], images: int) -> Iterator[Batch]:
    """The batches, with a bar over the images for whoever watches."""
    with progress(None, "images", total=images) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.index) + len(batch.broken))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _draw(target: Path, precision: Precision, names: list[str], told: dict[str, Any]) -> None:
    from mobileformer.evaluation.precision import THRESHOLDS
    from mobileformer.visualize.precision_recall import draw_precision_recall

    title = (
        f"{Path(told['weights']).name} on {Path(told['data']).name}, {told['split']}: AP {_figure(told['AP'])} of "
        f"{told['images']} images"
    )
    try:
        draw_precision_recall(precision.recalls, precision.curves, THRESHOLDS, names, target, title=title)
    except (ImportError, OSError) as error:
        raise CommandError(str(error)) from error


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    figures = [key for key in report if key.startswith(("AP", "AR"))]
    print_table(
        f"{report['weights']} ({report['detector']}, {report['variant']}) on {report['data']}, {report['split']}: "
        f"{report['images']} images, short side {report['size']}",
        [key.replace("_", "\n") for key in figures],
        [[_figure(report[key]) for key in figures]],
        caption=f"{report['objects']} objects, {report['found']} boxes found. {report['images_per_second']:.0f} img/s "
        f"with loading, {report['seconds']:.1f} s in all, batch {report['batch']}, {report['threads']} threads, "
        f"{report['device']}.",
    )
    print_table(
        "Classes",
        ("class", "name", "AP", "AP50"),
        [
            (index, row["name"], _figure(row["AP"]), _figure(row["AP50"]))
            for index, row in enumerate(report["classes"])
            if row["AP"] is not None
        ],
        caption=f"Names: {report['classes_named_by']}.",
    )
    note(f"images of {report['images_from']}")
    without = [row["name"] for row in report["classes"] if row["AP"] is None]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        note(f"no objects of {len(without)} classes, which count for nothing: {', '.join(without[:5])}{more}")
    for message in report["broken"][:MOST]:
        note(f"broken image left out: {message}")
    if report["broken"]:
        note(f"{len(report['broken'])} images could not be read and count for nothing")
    if "curves" in report:
        note(f"{report['curves']}: written")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
