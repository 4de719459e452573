"""`mobileformer make-detection-data`: items of Fashion-MNIST on photos, a set to try detection on without COCO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mobileformer.cli.output import CommandError, JsonOption, command, print_json, print_table, progress

__all__ = ["make_detection_data"]

MOST = 1_000_000  # images of a split


def make_detection_data(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    photos: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Photos for the backgrounds; may be repeated. scikit-image, the value unless given, stands for "
            "those in that package.",
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Fashion-MNIST's four IDX files; else where Debian's dataset-fashion-mnist puts them.",
        ),
    ] = None,
    train: Annotated[int, typer.Option(min=1, max=MOST, help="Images to train on.")] = 12000,
    val: Annotated[int, typer.Option(min=1, max=MOST, help="Images to validate on.")] = 600,
    test: Annotated[int, typer.Option(min=1, max=MOST, help="Images to test on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all that is drawn.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, where this command made it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a set for object detection: 1 to 6 items of Fashion-MNIST on each of many crops of photos, 128 x 128 pixels.

    Annotations are in COCO's format, with ten classes. No photo and no item is in two of train, val and test.
    recipe.json in OUT says what it was made from. OUT appears whole or not at all.
    """
    with command(as_json):
        _check_target(out, force=force)
        recipe = _make(out, photos, items, {"train": train, "val": val, "test": test}, seed)
        if as_json:
            print_json({"out": str(out), **recipe})
        else:
            rows = [
                (split, made["images"], made["objects"], len(made["photos"]), made["items"])
                for split, made in recipe["splits"].items()
            ]
            print_table(str(out), ("split", "images", "objects", "photos", "items to choose from"), rows)


def _check_target(out: Path, *, force: bool) -> None:
    from mobileformer.data.compose import RECIPE

    if not os.path.lexists(out):
        return
    if not force:
        raise CommandError(f"{out}: exists already; --force replaces it")
    # What is replaced is removed with all that is in it.
    if not out.is_dir() or (any(out.iterdir()) and not (out / RECIPE).is_file()):
        raise CommandError(f"{out}: not made by this command (no {RECIPE} in it), so --force does not replace it")


def _make(out: Path, photos: list[str] | None, items: Path | None, counts: dict[str, int], seed: int) -> dict[str, Any]:
    from mobileformer.data.compose import DEBIAN_ITEMS, SCIKIT_IMAGE, compose, read_items, read_photos
    from mobileformer.files.replacing import replacing_folder

    if items is None and not Path(DEBIAN_ITEMS).is_dir():
        raise CommandError(
            "--items: expected a folder with Fashion-MNIST's four files (train-images-idx3-ubyte.gz and so on, from "
            f"github.com/zalandoresearch/fashion-mnist); Debian's dataset-fashion-mnist, in {DEBIAN_ITEMS}, is not "
            "installed"
        )
    try:
        chosen_items = read_items(items or DEBIAN_ITEMS)
        chosen_photos = read_photos(photos or (SCIKIT_IMAGE,))
        with replacing_folder(out) as folder:
            return compose(folder, chosen_photos, chosen_items, counts, seed=seed, watch=progress)
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(str(error)) from error
