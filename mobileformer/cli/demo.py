"""`mobileformer demo`: images through the shipped weights; a photo through the fused and the plain path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobileformer.cli.bench import show_rows
from mobileformer.cli.output import (
    MAX_REPEATS,
    MAX_THREADS,
    CommandError,
    JsonOption,
    check_variant,
    command,
    machine_line,
    note,
    print_json,
    print_table,
    progress,
)
from mobileformer.cli.weights import open_detector, open_predictor, photo_tensor

if TYPE_CHECKING:
    from mobileformer.visualize.contact_sheet import Entry

__all__ = ["demo"]

SAYS = """\
Weights: random, from a fixed seed, since none for ImageNet come with this package. The logits mean nothing
here, but every path must compute the same ones, and in as little time as it can."""


def demo(
    image: Annotated[
        Path | None, typer.Argument(metavar="IMAGE", help="A photo to time the paths on; else the cat in the package.")
    ] = None,
    variant: Annotated[str, typer.Option(callback=check_variant, help="What is timed: 26m ... 508m.")] = "294m",
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of PyTorch.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=MAX_REPEATS, help="Rounds; every path runs once in each.")] = 20,
    sheet: Annotated[Path, typer.Option(metavar="PNG", help="Where the contact sheet goes.")] = Path("demo.png"),
    as_json: JsonOption = False,
) -> None:
    """Classify a dozen real test images with the weights in the package, then time the plain and the fused paths.

    With the detector in the package it also finds clothes on a dozen photos: PNG-boxes.png has them with what is there.
    """
    with command(as_json):
        classified = _classify(sheet)
        if not as_json:
            _show_classes(classified, sheet)
        box_sheet = sheet.with_name(f"{sheet.stem}-boxes.png")
        detected = _detect(box_sheet)
        if detected is not None and not as_json:
            _show_boxes(detected, box_sheet)
        report = {
            "classified": classified,
            "contact_sheet": str(sheet),
            "detected": detected,
            "box_sheet": None if detected is None else str(box_sheet),
            **_race(image, variant, threads, repeats),
        }
        if as_json:
            print_json(report)
        else:
            _show_race(report)
        rows = report["contenders"] + report["contenders_float64"]
        if any(row["error"] for row in rows):
            raise typer.Exit(1)


def _classify(sheet: Path) -> list[dict[str, Any]]:
    """What the shipped weights make of the sample images, and the sheet that shows it."""
    from mobileformer.pretrained import sample_images, shipped_weights
    from mobileformer.visualize.contact_sheet import Entry, draw_contact_sheet

    predictor, samples = open_predictor(shipped_weights(), top_k=1), sample_images()
    best = [answer.best for answer in predictor(picture for picture, _ in samples)]
    entries = [
        Entry(picture, truth, str(row.label), row.probability)
        for (picture, truth), row in zip(samples, best, strict=True)
    ]
    title = f"Mobile-Former {predictor.metadata.variant} on images of Fashion-MNIST's test set"
    try:
        draw_contact_sheet(entries, title, sheet)
    except OSError as error:
        raise CommandError(f"--sheet: {error}") from error
    return [_row(entry) for entry in entries]


def _row(entry: Entry) -> dict[str, Any]:
    return {"truth": entry.truth, "prediction": entry.guess, "probability": entry.probability}


def _show_classes(classified: list[dict[str, Any]], sheet: Path) -> None:
    right = sum(row["truth"] == row["prediction"] for row in classified)
    print_table(
        f"Fashion-MNIST, first images of the test set: {right} of {len(classified)} right",
        ("it is", "52m says", "probability"),
        [(row["truth"], row["prediction"], f"{100 * row['probability']:.1f} %") for row in classified],
    )
    note(f"written: {sheet}")


def _detect(sheet: Path) -> list[dict[str, Any]] | None:
    """What the shipped detector finds on the sample scenes, and the sheet that shows it; None where there is none."""
    import numpy as np

    from mobileformer.pretrained import sample_scenes, shipped_weights
    from mobileformer.visualize.boxes import SHEET_SIDE, draw_box_sheet, draw_boxes

    try:
        weights = shipped_weights("detection")
    except FileNotFoundError:
        return None
    predictor, scenes = open_detector(weights), sample_scenes()
    names = predictor.names
    answers = list(predictor(picture for picture, _ in scenes))
    pictures, captions = [], []
    for (picture, objects), found in zip(scenes, answers, strict=True):
        if found.error is not None:
            raise CommandError(found.error)
        truth = {
            "boxes": np.array([box for _, box in objects]),
            "labels": np.array([names.index(name) for name, _ in objects]),
        }
        pictures.append(draw_boxes(picture, names, found.arrays(), truth, least_side=SHEET_SIDE))
        captions.append(f"{len(objects)} there, {len(found.boxes)} found")
    title = f"{predictor.detector} on Mobile-Former {predictor.metadata.variant}: clothes on photos of the test set"
    try:
        draw_box_sheet(pictures, captions, title, sheet)
    except OSError as error:
        raise CommandError(f"--sheet: {error}") from error
    return [
        {"truth": [{"label": name, "box": box} for name, box in objects], "found": found.row()["boxes"]}
        for (_, objects), found in zip(scenes, answers, strict=True)
    ]


def _show_boxes(detected: list[dict[str, Any]], sheet: Path) -> None:
    print_table(
        "Clothes on photos, first images of the test set",
        ("there", "found", "score"),
        [
            (
                ", ".join(sorted(row["label"] for row in scene["truth"])),
                ", ".join(sorted(row["label"] for row in scene["found"])),
                " ".join(f"{row['score']:.2f}" for row in sorted(scene["found"], key=lambda row: row["label"])),
            )
            for scene in detected
        ],
    )
    note(f"written: {sheet}")


def _race(image: Path | None, variant: str, threads: int, repeats: int) -> dict[str, Any]:
    import torch

    from mobileformer.data import sample_photo
    from mobileformer.inference.threads import thread_count
    from mobileformer.measure.machine import machine
    from mobileformer.race.trial import EAGER, Trial

    photo = image or sample_photo()
    x = photo_tensor(photo, 224)[None]
    with thread_count(threads):
        exact = Trial(variant, x, dtype=torch.float64)
        exact.add("eager", "fused", "fused inference")
        exact.check(lambda items: progress(items, "float64"))
        trial = Trial(variant, x)
        trial.add(*EAGER, "fused", "fused inference")
        trial.check(lambda items: progress(items, "float32"))
        trial.time(repeats, lambda rounds: progress(rounds, "rounds"))
        described = machine()
    return {
        "image": str(photo),
        "variant": variant,
        "weights": "random, seed 0: logits mean nothing, only their agreement does",
        "largest_logit": exact.reference.abs().max().item(),
        "machine": described,
        "contenders": trial.rows(),
        "contenders_float64": exact.rows(),
    }


def _show_race(report: dict[str, Any]) -> None:
    typer.echo(f"\n{report['image']}, 224 x 224, through Mobile-Former {report['variant']}, batch 1.\n{SAYS}\n")
    double = ", ".join(
        f"{row['name']} {row['logit_difference']:.1e}"
        for row in report["contenders_float64"]
        if not row["error"] and row["name"] != "eager"
    )
    show_rows(
        "float32",
        report["contenders"],
        caption=f"Largest logit: {report['largest_logit']:.2f}. Off in float64: {double or 'see errors'}.\n"
        + machine_line(report["machine"]),
    )
    for row in report["contenders_float64"]:
        if row["error"]:
            typer.echo(f"error: float64 {row['name']}: {row['error']}", err=True)
