"""`mobileformer visualize` of a detector: where each query of an end-to-end one looks, or the boxes of RetinaNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mobileformer.cli.output import CommandError, note, print_table
from mobileformer.cli.weights import open_detector

if TYPE_CHECKING:
    from mobileformer.prediction import DetectionPredictor

__all__ = ["run", "show"]

MOST = 11  # queries on a sheet, beside the photo with all of their boxes
STRIDE = 8  # of the map that the queries read last


def run(image: Path, weights: Path, out: Path | None, page: Path | None, size: int | None) -> dict[str, Any]:
    """Write the picture; what `--json` prints. Raises CommandError, and BadParameter for a page."""
    from mobileformer.data import ImageError

    if page is not None or out is None:
        raise typer.BadParameter("is for the attention of a classifier", param_hint="--html")
    predictor = open_detector(weights, size=size, keep_images=True)
    try:
        rows = _DRAWN[predictor.detector](predictor, image, out)
    except ImageError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"--out {error.filename or out}: {error.strerror or error}") from error
    return {
        "image": str(image),
        "weights": str(weights),
        "detector": predictor.detector,
        "variant": predictor.metadata.variant,
        "size": predictor.size,
        "png": str(out),
        **rows,
    }


def _queries(predictor: DetectionPredictor, image: Path, out: Path) -> dict[str, Any]:
    """A sheet of the surest queries, and what it shows of each in numbers."""
    import torch

    from mobileformer.visualize.queries import Query, draw_queries

    picture, sample = predictor.prepare(image, str(image))
    x, y = predictor.transform.collate([sample], 1)
    with torch.no_grad(), predictor.computing():
        (seen,) = predictor.model.attention_points(x, y.sizes)  # type: ignore[operator]
    if not all(bool(value.isfinite().all()) for value in seen.values()):
        raise CommandError(f"{image}: the network's attention is not finite, so there is nothing to draw")
    height, width = y.sizes[0].tolist()
    boxes, points = y.in_original(seen["boxes"], 0), y.in_original(seen["points"].repeat(1, 2), 0)[:, :2]
    queries = [
        Query(
            index,
            int(seen["labels"][index]),
            float(seen["scores"][index]),
            boxes[index].numpy(),
            points[index].numpy(),
            seen["attention"][index].numpy(),
            (width / STRIDE, height / STRIDE),
        )
        for index in seen["scores"].argsort(descending=True, stable=True)[:MOST].tolist()
    ]
    metadata, names = predictor.metadata, predictor.names
    title = f"Where {len(queries)} of {len(boxes)} queries of {metadata.variant} look, {image.name}"
    draw_queries(picture, queries, names, out, title=title)
    return {
        "queries": [
            {
                "query": query.index,
                "label": None if predictor.labels is None else names[query.label],
                "class": query.label,
                "score": query.score,
                "box": query.box.tolist(),
                "point": query.point.tolist(),
                "spread": query.spread,
            }
            for query in queries
        ]
    }


def _boxes(predictor: DetectionPredictor, image: Path, out: Path) -> dict[str, Any]:
    """The photo with what is found on it."""
    from mobileformer.files.replacing import replacing
    from mobileformer.visualize.boxes import draw_boxes

    (found,) = predictor([str(image)])
    if found.error is not None:
        raise CommandError(found.error)
    assert found.image is not None  # kept for this
    picture = draw_boxes(found.image, predictor.names, found.arrays())
    with replacing(out) as temporary:
        picture.save(temporary, format="PNG")
    return {"boxes": found.row()["boxes"]}


_DRAWN: dict[str, Callable[[DetectionPredictor, Path, Path], dict[str, Any]]] = {
    "end-to-end": _queries,
    "retinanet": _boxes,
}


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    title = f"{report['detector']}, {report['variant']}, {report['image']}"
    if "queries" in report:
        print_table(
            title,
            ("query", "name", "score", "left top right bottom", "looks from", "looks at, share of the map"),
            [
                (row["query"], *_cells(row), " ".join(f"{side:.0f}" for side in row["point"]), f"{row['spread']:.2f}")
                for row in report["queries"]
            ],
            caption="looks at: e to the entropy of a query's weights over the positions there are.",
        )
    else:
        print_table(title, ("name", "score", "left top right bottom"), [_cells(row) for row in report["boxes"]])
    note(f"{report['png']}: written")


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    name = row["label"] or f"class {row['class']}"
    return name, f"{100 * row['score']:.1f} %", " ".join(f"{side:.0f}" for side in row["box"])
