"""`mobileformer demo`: a photo through the fused and the plain path, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mobileformer.cli.bench import photo_tensor, show_rows
from mobileformer.cli.output import JsonOption, check_variant, command, machine_line, print_json, progress

__all__ = ["demo"]

SAYS = """\
Weights: random, from a fixed seed, because no trained weights come with this package. So there are no class
names here: the logits mean nothing, but every path must compute the same ones.
For answers: mobileformer predict --help"""


def demo(
    image: Annotated[Path | None, typer.Argument(metavar="IMAGE", help="A photo; else the cat in the package.")] = None,
    variant: Annotated[str, typer.Option(callback=check_variant, help="26m ... 508m.")] = "294m",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of PyTorch.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; every path runs once in each.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Run a photo through the plain and the fused paths: do they agree, which kernels ran, how long?"""
    with command(as_json):
        report = _run(image, variant, threads, repeats)
        if as_json:
            print_json(report)
        else:
            _show(report)
        rows = report["contenders"] + report["contenders_float64"]
        if any(row["error"] for row in rows):
            raise typer.Exit(1)


def _run(image: Path | None, variant: str, threads: int, repeats: int) -> dict[str, Any]:
    import torch

    from mobileformer.cli.contenders import EAGER, Trial
    from mobileformer.data import sample_photo
    from mobileformer.inference.threads import thread_count
    from mobileformer.measure import machine

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


def _show(report: dict[str, Any]) -> None:
    typer.echo(f"{report['image']}, 224 x 224, through Mobile-Former {report['variant']}, batch 1.\n{SAYS}\n")
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
