"""What the commands share: where output goes, how a failure is told, how a table is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

__all__ = [
    "CommandError",
    "JsonOption",
    "check_device",
    "check_variant",
    "command",
    "machine_line",
    "note",
    "print_json",
    "print_table",
    "progress",
]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]


class CommandError(Exception):
    """A failure the user can do something about; its message is all that is shown."""


@contextmanager
def command(as_json: bool) -> Iterator[None]:
    """Around a command's body: a `CommandError` becomes its message and exit code 1, Ctrl-C exit code 130."""
    try:
        yield
    except CommandError as error:
        fail(str(error), as_json)
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(130) from None


def fail(message: str, as_json: bool) -> NoReturn:
    """Tell a failure on standard error, with --json also as {"error": message}; leave with exit code 1."""
    note(f"error: {message}")
    if as_json:
        print_json({"error": message})
    raise typer.Exit(1)


def note(message: str) -> None:
    """A line for the person watching, on standard error."""
    typer.echo(message, err=True)


def print_json(document: Any) -> None:
    """Strict JSON: a NaN here would be a bug, so it raises."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str | None = None
) -> None:
    """A table on standard output. Columns whose cells are all numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without a terminal rich assumes 80 columns and folds cells; a file or a pipe has room.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        numeric = all(_is_number(str(row[index])) for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: a file name may look like rich's markup
    console.print(table)


def progress(items: Any, description: str, *, total: int | None = None) -> Any:
    """A progress bar on standard error, only where somebody watches, gone when it is done."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, leave=False, disable=None, file=sys.stderr)


def machine_line(machine: dict[str, str | int]) -> str:
    """`mobileformer.measure.machine` in one line."""
    named = ("cpu", "instruction_set", "system", "gpu")
    told = [str(machine[key]) for key in named if key in machine]
    told += [f"{key} {value}" for key, value in machine.items() if key not in named]
    return ", ".join(told)


def check_variant(value: str | None) -> str | None:
    """Callback of --variant options: a known variant's name."""
    from mobileformer import VARIANTS

    if value is not None and value not in VARIANTS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(VARIANTS)}")
    return value


def check_device(device: str) -> None:
    """Raise CommandError where the device that was asked for is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} finds no CUDA device")


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(" ", "").rstrip("xM%"))
    except ValueError:
        return False
    return True
