"""`mobileformer evaluate` of a classifier: accuracy on a split of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from mobileformer.cli.output import CommandError, note, print_table, progress
from mobileformer.cli.weights import open_predictor, read_labels, warnings_told

if TYPE_CHECKING:
    from torch import Tensor

    from mobileformer.data.batch import Transform
    from mobileformer.data.transforms import ImageTransform
    from mobileformer.evaluation.accuracy import Report, Score
    from mobileformer.prediction import InputView, Predictor

__all__ = ["BATCH", "complaints", "run", "show"]

BATCH = 64
COMPARED = ("plain", "fused", "engine")
MOST = 10  # mistakes and broken images that are shown; --json has all


def run(
    data: str, weights: Path, *, split: Literal["train", "val", "test", "all"], batch: int, size: int | None,
    labels: Path | None, device: str, workers: int, threads: int | None, max_broken: int,
    path: str | None, precision: str, compare: bool, confusion: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """What `--json` prints. Raises CommandError, and BadParameter for options that do not go together."""
    import torch

    from mobileformer.data import DataError, evaluation_batches, open_source, sources
    from mobileformer.data.base import place
    from mobileformer.evaluation.accuracy import evaluate as count
    from mobileformer.evaluation.classes import EvaluationError, order_of_classes

    if compare and path is not None:
        raise typer.BadParameter("--compare runs all of them", param_hint="--path")
    if compare and precision != "float32":
        raise typer.BadParameter("--compare is in float32", param_hint=f"--precision {precision}")
    if confusion is not None and confusion.suffix.lower() != ".png":
        raise typer.BadParameter(f"{confusion}: expected the ending .png", param_hint="--confusion")
    predictors = _predictors(
        weights, COMPARED if compare else (path,), precision, size=size, device=device, threads=threads
    )
    metadata, view = next(iter(predictors.values())).metadata, next(iter(predictors.values())).view
    names = read_labels(labels, metadata.num_classes) if labels is not None else metadata.labels
    try:
        with warnings_told(sources.__name__):
            source = open_source(data, split, channels=metadata.in_chans, partial=True)
        present = getattr(source, "present", None)
        order = order_of_classes(source.classes, names, metadata.num_classes, present=present)
        loaded = evaluation_batches(source, _transform(predictors, view), batch_size=batch, workers=workers)
        start = time.perf_counter()
        report = count(
            {name: _on_tensors(predictor) for name, predictor in predictors.items()},
            _watched(loaded, len(source)),
            num_classes=metadata.num_classes,
            order=order,
            max_broken=max_broken,
        )
        seconds = time.perf_counter() - start
    except (DataError, EvaluationError, ImportError, OSError) as error:
        raise CommandError(f"{data}: {error}" if isinstance(error, EvaluationError) else str(error)) from error
    by = "--labels" if labels else "weights" if metadata.labels else "data, in its order"
    if names is None:
        placed = dict(zip(order, source.classes, strict=True))
        names = [placed.get(index, str(index)) for index in range(metadata.num_classes)]
        if order != list(range(metadata.num_classes)):
            by = "data, whose names are the classes' numbers"
    told = {
        "data": data,
        "split": split,
        "weights": str(weights),
        "variant": metadata.variant,
        "size": view.size,
        "crop_fraction": view.crop_fraction,
        "batch": batch,
        "device": device,
        "threads": threads or torch.get_num_threads(),
        "images_from": place(source),
        "classes_named_by": by,
        **_described(report, names, seconds),
    }
    if confusion is not None:
        _draw(confusion, report, names, told)
        told["confusion"] = str(confusion)
    return told


def _predictors(weights: Path, paths: tuple[str | None, ...], precision: str, **options: Any) -> dict[str, Predictor]:
    """What computes, by the name that the report has for it: the path, with "-bf16" behind it for bfloat16."""
    found = {}
    for path in paths:
        asked, bf16 = (path.removesuffix("-bf16"), path.endswith("-bf16")) if path else (None, False)
        predictor = open_predictor(weights, path=asked, precision="bfloat16" if bf16 else precision, **options)
        network = predictor.network
        found[network.path + ("-bf16" if network.precision == "bfloat16" else "")] = predictor
    return found


def _transform(predictors: dict[str, Predictor], view: InputView) -> Transform | ImageTransform:
    """Bytes where every network takes them; where one is PyTorch's, normalising would be part of its time."""
    from mobileformer.data import EvaluationTransform
    from mobileformer.prediction.samples import LabelledPixels

    if all(predictor.network.path == "engine" for predictor in predictors.values()):
        return LabelledPixels(view)
    return EvaluationTransform(view.size, view.mean, view.std, crop_fraction=view.crop_fraction)


def _on_tensors(predictor: Predictor) -> Callable[[Tensor], Tensor]:
    import torch

    return lambda x: torch.from_numpy(predictor.logits(x.numpy()))


def complaints(report: dict[str, Any]) -> list[str]:
    """What is wrong with the paths that differ from the first by more than rounding."""
    import torch

    from mobileformer.measure.difference import LOGIT_BOUNDS, why_wrong

    bound = LOGIT_BOUNDS["data set"][torch.float32]
    told = [(row["path"], why_wrong("logits", row["relative_difference"], bound)) for row in report["agreement"]]
    return [f"{path}: {wrong}" for path, wrong in told if wrong is not None]


def _watched(batches: Iterator[Any], images: int) -> Iterator[Any]:
    """The batches, with a bar over the images for whoever watches."""
    bar = progress(None, "images", total=images)
    with bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.y) + len(batch.broken))


def _described(report: Report, names: tuple[str, ...] | list[str], seconds: float) -> dict[str, Any]:
    first = next(iter(report.scores.values()))
    return {
        "images": first.images,
        "seconds": seconds,
        "images_per_second": first.images / seconds,
        "results": [_result(path, score) for path, score in report.scores.items()],
        "agreement": [
            {
                "path": path,
                "with": next(iter(report.scores)),
                "classified_differently": agreement.differently,
                "largest_difference": agreement.difference,
                "largest_logit": agreement.largest,
                "relative_difference": agreement.relative,
            }
            for path, agreement in report.agreements.items()
        ],
        "classes": [
            {
                "class": index,
                "label": name,
                "images": int(first.images_of_class[index]),
                "found": int(first.confusion[index, index]),
                "found_in_top5": int(first.top5[index]),
                "taken_for_it": int(first.confusion[:, index].sum()),
                "recall_percent": _percent(first.recall[index]),
                "precision_percent": _percent(first.precision[index]),
            }
            for index, name in enumerate(names)
        ],
        "mistakes": [{"class": a, "taken_for": b, "images": count} for a, b, count in first.mistakes()],
        "broken": list(report.broken),
    }


def _result(path: str, score: Score) -> dict[str, Any]:
    return {
        "path": path,
        "top1_correct": score.top1_correct,
        "top5_correct": score.top5_correct,
        "top1_percent": score.tally.top1_percent,
        "top5_percent": score.tally.top5_percent,
        "loss": score.tally.mean_loss,
        "network_images_per_second": score.images / score.seconds,
    }


def _percent(share: float) -> float | None:
    """None for what there is no image of: NaN is not JSON."""
    return 100 * float(share) if share == share else None


def _draw(target: Path, report: Report, names: tuple[str, ...] | list[str], told: dict[str, Any]) -> None:
    from mobileformer.visualize.confusion import draw_confusion

    result = told["results"][0]
    title = (
        f"{Path(told['weights']).name} on {Path(told['data']).name}, {told['split']}: top-1 "
        f"{result['top1_percent']:.2f} % of {told['images']}"
    )
    try:
        draw_confusion(next(iter(report.scores.values())).confusion, names, target, title=title)
    except (ImportError, OSError) as error:
        raise CommandError(str(error)) from error


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    print_table(
        f"{report['weights']} ({report['variant']}) on {report['data']}, {report['split']}: {report['images']} images "
        f"of {report['size']} x {report['size']}",
        ("path", "top-1", "of images", "top-5", "of images", "img/s in the network"),
        [
            (
                row["path"],
                f"{row['top1_percent']:.2f} %",
                row["top1_correct"],
                f"{row['top5_percent']:.2f} %",
                row["top5_correct"],
                f"{row['network_images_per_second']:.0f}",
            )
            for row in report["results"]
        ],
        caption=f"{report['images_per_second']:.0f} img/s with loading, {report['seconds']:.1f} s in all, batch "
        f"{report['batch']}, {report['threads']} threads, {report['device']}.",
    )
    if report["agreement"]:
        print_table(
            f"Beside {report['agreement'][0]['with']}",
            ("path", "images classified differently", "largest difference of a logit", "of the largest logit"),
            [
                (
                    row["path"],
                    row["classified_differently"],
                    f"{row['largest_difference']:.1e}",
                    f"{row['relative_difference']:.1e}",
                )
                for row in report["agreement"]
            ],
        )
    note(f"images of {report['images_from']}")
    without = [row["label"] for row in report["classes"] if not row["images"]]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        note(f"no images of {len(without)} classes, which count for nothing: {', '.join(without[:5])}{more}")
    _show_classes(report)
    for message in report["broken"][:MOST]:
        note(f"broken image left out: {message}")
    if report["broken"]:
        note(f"{len(report['broken'])} images could not be read and count for nothing")
    if "confusion" in report:
        note(f"{report['confusion']}: written")


def _show_classes(report: dict[str, Any]) -> None:
    shown = [row for row in report["classes"] if row["images"] or row["taken_for_it"]]
    shown = shown if len(shown) <= 100 else sorted(shown, key=lambda row: row["recall_percent"] or 0)[:20]
    print_table(
        "Classes" if len(shown) == len(report["classes"]) else f"Classes: {len(shown)} of {len(report['classes'])}",
        ("class", "name", "images", "recall", "precision"),
        [
            (row["class"], row["label"], row["images"], *map(_told, (row["recall_percent"], row["precision_percent"])))
            for row in shown
        ],
        caption=f"Names: {report['classes_named_by']}.",
    )
    names = [row["label"] for row in report["classes"]]
    rows = [(names[row["class"]], names[row["taken_for"]], row["images"]) for row in report["mistakes"][:MOST]]
    if rows:
        print_table("Most frequent mistakes", ("is", "taken for", "images"), rows)


def _told(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.1f} %"
