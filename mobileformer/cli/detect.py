"""`mobileformer detect`: objects in images, each with a box, a name and a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobileformer.cli.answers import BoxTable
from mobileformer.cli.output import (
    MAX_BATCH,
    MAX_SIZE,
    MAX_THREADS,
    MAX_WORKERS,
    CommandError,
    DeviceOption,
    JsonOption,
    check_device,
    check_memory,
    command,
    note,
    progress,
)
from mobileformer.cli.weights import check_threads_option, chosen_weights, open_detector, read_labels

if TYPE_CHECKING:
    from mobileformer.prediction import Found, Picture

__all__ = ["detect"]

FOLDER = Path("detections")
_STEM = 60  # characters of an image's name that go into its picture's: with the ending never more than 255 bytes


def _share(value: float) -> float:
    if value != value:  # NaN, which no bound excludes
        raise typer.BadParameter("expected a number")
    return value


def detect(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders (searched to the bottom), patterns."),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A detector's safetensors; else the one in the package (clothing)."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, callback=_share, help="Boxes with a lower score are left out.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where the pictures go; made if need be.",
            show_default="detections, here; with --json or --jsonl none are drawn",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: one a line, or a list in a .json file.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=32, max=MAX_SIZE, help="Short side that an image is resized to, in pixels; else what the file says."
        ),
    ] = None,
    device: DeviceOption = "auto",
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images in one call of the network.")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of the network; else PyTorch's choice.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=MAX_WORKERS, help="Threads that read images ahead of the network.")
    ] = 0,
    as_json: JsonOption = False,
    as_lines: Annotated[
        bool, typer.Option("--jsonl", help="A JSON line an image on standard output, as soon as it is known.")
    ] = False,
) -> None:
    """Find objects: a box around each, its name, and how sure the detector is of it.

    The boxes are drawn on each image, as NAME-boxes.png in a folder; nothing there is overwritten, a name that is taken
    gets a number. A bad file is reported and the rest is done; the exit code is then 1.

    With --json an image's answer is {"path", "width", "height", "boxes", "picture"}, a box {"label", "class", "score",
    "box": [x1, y1, x2, y2]} in pixels of the upright image; or {"path", "error"}. With --jsonl that is a line.

    Answers are written while it runs: Ctrl-C leaves those that there are, and with --json a whole document.
    """
    with command(as_json or as_lines, lines=as_lines) as document:
        if as_lines and as_json:
            raise typer.BadParameter("is another form of --json; give one", param_hint="--jsonl")
        folder = out if out is not None or document.wanted else FOLDER
        _check_folder(folder)
        weights = chosen_weights(weights, "detection")
        check_threads_option(threads)
        predictor = open_detector(
            weights, size=size, threshold=threshold, device=check_device(device), threads=threads, workers=workers,
            batch=batch, keep_images=folder is not None,
        )  # fmt: skip
        metadata = predictor.metadata
        if labels is not None:
            predictor.labels = read_labels(labels, metadata.num_classes)
        check_memory(predictor.size, batch, channels=metadata.in_chans)
        draw = None if folder is None else _Pictures(folder, predictor.names)
        table = BoxTable(predictor.names)
        add: Callable[[Found, str | None], None] = lambda found, picture: table.add(found)  # noqa: E731
        if document.wanted:
            told = {
                "weights": str(weights),
                "detector": predictor.detector,
                "variant": metadata.variant,
                "device": predictor.device,
                "size": predictor.size,
                "threshold": threshold,
            }
            document.begin(told, "results")
            add = lambda found, picture: document.add(_row(found, picture))  # noqa: E731
        count = document.tail["failed"] = failed = 0
        with closing(document if document.wanted else table):
            for found in predictor(_watched(images)):
                count += 1
                picture = None
                if found.error is not None:
                    note(f"error: {found.error}")
                    document.tail["failed"] = failed = failed + 1
                elif draw is not None:
                    picture = str(draw(found))
                add(found, picture)
        if document.wanted:
            document.end()
        if draw is not None and draw.written:
            note(f"{folder}: {draw.written} {'picture' if draw.written == 1 else 'pictures'} written")
        if failed:
            if count > 1:
                note(f"{failed} of {count} failed")
            raise typer.Exit(1)


def _check_folder(folder: Path | None) -> None:
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder}: expected a folder, found something else")
    if not folder.absolute().parent.is_dir():
        raise CommandError(f"--out {folder}: the folder {folder.parent} does not exist")


def _watched(images: list[str]) -> Iterator[Picture]:
    """The images, with a bar for whoever watches."""
    from mobileformer.prediction import pictures_in

    return progress(pictures_in(images), "images")


def _row(found: Found, picture: str | None) -> dict[str, Any]:
    row = found.row()
    return row if found.error is not None else {**row, "picture": picture}


class _Pictures:
    """Draws answers into a folder, each under a name that is free. Raises CommandError for what cannot be written."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.written = 0
        self._numbers: dict[str, int] = {}  # the last that was given to a name, so that none is looked for twice

    def __call__(self, found: Found) -> Path:
        from mobileformer.files.replacing import replacing
        from mobileformer.visualize.boxes import draw_boxes

        assert found.image is not None  # kept for this
        picture = draw_boxes(found.image, self.names, found.arrays())
        try:
            self.folder.mkdir(exist_ok=True)
            path = self._free(Path(found.name).stem[:_STEM])
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")
        except OSError as error:
            raise CommandError(f"--out: {error.filename or self.folder}: {error.strerror or error}") from error
        self.written += 1
        return path

    def _free(self, stem: str) -> Path:
        while True:
            number = self._numbers[stem] = self._numbers.get(stem, 0) + 1
            path = self.folder / f"{stem}-boxes{'' if number == 1 else f'-{number}'}.png"
            if not path.exists() and not path.is_symlink():
                return path
