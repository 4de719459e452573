"""The command line: `mobileformer COMMAND`, one file for each command; `mobileformer --help` lists them.

Every command prints tables for people, or with --json one JSON document and nothing else on standard output.
Exit codes: 0 fine, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from mobileformer.cli import bench, convert, demo, evaluate, export, info, predict, train, visualize

__all__ = ["app", "main"]

app = typer.Typer(
    name="mobileformer",
    help="Mobile-Former, exact and fused: train, classify images, see what it attends to, measure, convert, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback goes into a bug report: whole, and without values
)
app.command("info")(info.info)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("visualize")(visualize.visualize)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the console script and of `python -m mobileformer`; leaves by SystemExit."""
    try:
        try:
            app(prog_name="mobileformer")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone: not our failure, but nobody got the rest either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
