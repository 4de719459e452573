"""What the commands share: how a failure is told, the device, how a table is drawn."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from mobileformer.cli.streams import (
    CommandError,
    Document,
    ReaderGone,
    note,
    one_line,
    print_json,
    printable,
    write,
)

__all__ = [
    "MAX_BATCH",
    "MAX_REPEATS",
    "MAX_SIZE",
    "MAX_THREADS",
    "MAX_WORKERS",
    "CommandError",
    "DeviceOption",
    "Document",
    "JsonOption",
    "check_device",
    "check_memory",
    "check_variant",
    "command",
    "machine_line",
    "note",
    "print_json",
    "print_table",
    "progress",
]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]

# Beyond these a number is a slip of the finger, and would take all memory or never end.
MAX_BATCH, MAX_SIZE, MAX_THREADS, MAX_WORKERS, MAX_REPEATS = 65536, 8192, 1024, 1024, 1_000_000

# What typer raises for wrong usage; whether that class is click's or typer's own depends on the version.
_Usage = typer.BadParameter.__mro__[1]


@contextmanager
def command(as_json: bool, *, lines: bool = False) -> Iterator[Document]:
    """Around a command's body, and around all of them: whatever fails is one line and an exit code, never a traceback.

    | what | line on standard error | exit code |
    |---|---|---|
    | `CommandError`, OSError, no memory | error: the reason | 1 |
    | wrong usage | error: the reason, and which --help | 2 |
    | Ctrl-C | interrupted | 130 |
    | the reader of standard output has gone | none | 1 |
    | anything else, a fault of this package | error: internal error: ... | 1 |

    With --json (`as_json`; `lines`: as one line) standard output gets {"error": ...}, in the document that was begun if
    there is one. MOBILEFORMER_DEBUG=1 shows where an error came from.
    """
    document = Document(as_json, lines=lines)
    try:
        yield document
    except (typer.Exit, SystemExit):
        raise
    except ReaderGone:
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        note("interrupted")
        with contextlib.suppress(CommandError, ReaderGone):
            document.fail("interrupted")
        raise typer.Exit(130) from None
    except Exception as error:  # noqa: BLE001 every one of them is told, and with MOBILEFORMER_DEBUG shown
        if os.environ.get("MOBILEFORMER_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        if _is_bare_call(error):
            write(error.ctx.get_help() + "\n")  # pyright: ignore[reportAttributeAccessIssue]
            raise typer.Exit(2) from None
        message, code = _told(error)
        note(f"error: {printable(one_line(message))}")
        with contextlib.suppress(CommandError, ReaderGone):
            document.fail(message)
        raise typer.Exit(code) from None


def _is_bare_call(error: Exception) -> bool:
    return type(error).__name__ == "NoArgsIsHelpError"


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, CommandError):
        return str(error), 1
    if isinstance(error, _Usage):
        context = error.ctx  # pyright: ignore[reportAttributeAccessIssue]
        where = f" ({context.command_path} --help tells more)" if context is not None else ""
        return one_line(error.format_message()) + where, 2  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    ):
        return f"not enough memory: {one_line(str(error))[:200]}" if str(error) else "not enough memory", 1
    if isinstance(error, RecursionError):
        return "the input is nested too deeply", 1
    if isinstance(error, OSError):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if not named and not _stdout_works():
            named = ["standard output"]  # typer's help text did not fit
        return ": ".join([*named, error.strerror or str(error) or type(error).__name__]), 1
    said = f"{type(error).__name__}: {one_line(str(error))[:500]}"
    return f"internal error: {said} (a fault of this package; MOBILEFORMER_DEBUG=1 shows where)", 1


def _stdout_works() -> bool:
    try:
        write("")
    except (CommandError, ReaderGone):
        return False
    return True


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str | None = None,
    *,
    width: int = 200,
) -> None:
    """A table on standard output, `width` wide at most where that is no terminal. Columns of numbers are set right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    # Without a terminal rich assumes 80 columns and folds cells; a file or a pipe has room, and names are searched for.
    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    told = escape(caption) if caption else caption  # names of classes and files stand in both
    table = Table(title=escape(title), caption=told, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        numeric = all(_is_number(str(row[index])) for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))  # Text: a file name may look like rich's markup
    with console.capture() as drawn:
        console.print(table)
    write(drawn.get())


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


def parse_device(value: str) -> str:
    """Callback of --device options: a device's name, whether there is one or not."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise typer.BadParameter(f"{value!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return value


DeviceOption = Annotated[
    str,
    typer.Option(
        callback=parse_device,
        metavar="DEVICE",
        help="Where it runs: auto (a GPU if there is one), cpu, cuda, cuda:N, mps.",
    ),
]


def check_device(device: str) -> str:
    """The device that was asked for, of auto the one that it means. Raises CommandError where it is not there."""
    if device == "cpu":
        return device

    import torch

    there = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if there else "cpu"
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise CommandError(f"--device mps: torch {torch.__version__} finds no GPU of Apple's")
        return device
    if not there:
        raise CommandError(f"--device {device}: torch {torch.__version__} finds no CUDA device")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise CommandError(f"--device {device}: there are cuda:0 to cuda:{count - 1}")
    return device


def check_memory(size: int, batch: int, *, channels: int = 3) -> None:
    """Raise CommandError where a batch of images alone, in float32, is more than this machine has memory."""
    needed = 4 * channels * batch * size * size
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows; there the allocation itself is refused
        return
    if needed > there:
        raise CommandError(
            f"--batch {batch} --size {size}: the images alone take {needed / 1e9:.0f} GB, "
            f"this machine has {there / 1e9:.0f} GB"
        )


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(" ", "").rstrip("xM%"))
    except ValueError:
        return False
    return True
