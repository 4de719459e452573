"""The command line: `mobileformer COMMAND`, one file for each command; `mobileformer --help` lists them.

Every command prints tables for people, or with --json one JSON document and nothing else on standard output.
Exit codes: 0 fine, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mobileformer import __version__
from mobileformer.cli import (
    bench,
    convert,
    demo,
    detect,
    evaluate,
    export,
    info,
    make_detection_data,
    predict,
    train,
    visualize,
)
from mobileformer.cli.output import command
from mobileformer.cli.streams import prepare_streams, write

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """The commands, and the one place where what fails in any of them, or in their arguments, ends."""

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """As the class above, but that a failure is one line, see `mobileformer.cli.output.command`."""
        if not standalone_mode:
            return super().main(args, *rest, standalone_mode=False, **extra)
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        try:
            with command("--json" in options or "--jsonl" in options, lines="--jsonl" in options):
                prepare_streams()
                code = super().main(args, *rest, standalone_mode=False, **extra)
                write("")  # what a help text left in the buffer
        except typer.Exit as stopped:
            code = stopped.exit_code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="mobileformer",
    cls=Commands,
    help="Mobile-Former, exact and fused: train, classify images, detect objects, see what it attends to, measure, "
    "convert, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback goes into a bug report: whole, and without values
)


def _tell_version(asked: bool) -> None:
    if asked:
        try:
            torch = metadata.version("torch")  # of what is installed: importing it takes seconds
        except metadata.PackageNotFoundError:
            torch = "not installed"
        write(f"mobileformer {__version__}, torch {torch}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="This package's and torch's version."),
    ] = False,
) -> None:
    pass


app.command("info")(info.info)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("detect")(detect.detect)
app.command("visualize")(visualize.visualize)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("demo")(demo.demo)
app.command("make-detection-data")(make_detection_data.make_detection_data)


def main() -> None:
    """Entry point of the console script and of `python -m mobileformer`; leaves by SystemExit."""
    app(prog_name="mobileformer")
