"""Standard output and standard error of the commands: what they cannot encode is escaped, what they refuse is told."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import unicodedata
from typing import Any

__all__ = [
    "CommandError",
    "Document",
    "ReaderGone",
    "note",
    "one_line",
    "prepare_streams",
    "print_json",
    "printable",
    "silence",
    "write",
]

# Control characters, halves of surrogate pairs, line and paragraph separators: what would break a line, move a
# terminal's cursor, or is in no encoding. A file name may hold all of them.
_ESCAPED = {"Cc", "Cs", "Zl", "Zp"}
_MOST = 8  # further lines of a message that go into its one line


class CommandError(Exception):
    """A failure the user can do something about; its message is all that is shown."""


class ReaderGone(Exception):
    """Who read standard output (head, less) has left."""


def prepare_streams() -> None:
    """Escape what the streams' encoding lacks, in place of an error after the work. Raises CommandError without stdout.

    Python has None for a stream that the process was started without. Standard error may be missed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    write("")  # refuses a closed one now


def silence() -> None:
    """Nothing more to standard output, or Python would try again when it ends and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream in memory has no number
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def write(text: str) -> None:
    """Text to standard output, at once. Raises ReaderGone and CommandError: nobody reads it, or it cannot be kept."""
    if sys.stdout is None:
        raise CommandError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        raise ReaderGone from None
    except OSError as error:
        silence()
        raise CommandError(f"standard output: {error.strerror}") from error


def note(message: str) -> None:
    """A line for the person watching, on standard error."""
    with contextlib.suppress(OSError):  # nobody watches
        sys.stderr.write(printable(message) + "\n")
        sys.stderr.flush()


def printable(text: str) -> str:
    """Text as one line that changes nothing around it: what is not to be seen is escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _ESCAPED else character
        for character in text
    )


def one_line(message: str) -> str:
    """A message of several lines, as lists of what is wrong with a file are, in one."""
    first, *rest = [line.strip() for line in message.strip().split("\n") if line.strip()] or ["unknown"]
    if len(rest) > _MOST:
        rest = [*rest[:_MOST], f"and {len(rest) - _MOST} more"]
    return f"{first.removesuffix(':')}: {'; '.join(rest)}" if rest else first


def print_json(document: Any) -> None:
    """Strict JSON, in ASCII, which any encoding holds. A NaN here would be a bug, so it raises."""
    write(json.dumps(document, indent=2, allow_nan=False) + "\n")


class Document:
    """A command's answer as JSON, if it was asked for: one document, or one that grows row by row, or a line a row.

    A document that was begun is whole JSON as soon as `end` was called, whatever happened in between.
    """

    def __init__(self, wanted: bool, *, lines: bool = False) -> None:
        self.wanted, self.lines = wanted, lines
        self.tail: dict[str, Any] = {}  # what stands behind the rows
        self._rows = -1  # -1: not begun

    def begin(self, head: dict[str, Any], rows: str) -> None:
        """Write what is known before the first row, and the name of the rows."""
        self._rows = 0
        if not self.lines:
            write(f"{json.dumps(head, indent=2, allow_nan=False)[:-2]},\n  {json.dumps(rows)}: [")

    def add(self, row: dict[str, Any]) -> None:
        if self.lines:
            text = json.dumps(row, allow_nan=False) + "\n"
        else:
            text = textwrap.indent(json.dumps(row, indent=2, allow_nan=False), "    ")
            text = ("," if self._rows else "") + "\n" + text
        self._rows += 1  # before it is written: where Ctrl-C comes between the two, the document stays whole
        write(text)

    def close(self) -> None:
        """Nothing yet: whether `end` or `fail` follows the rows is decided later. For who closes any kind of sink."""

    def end(self) -> None:
        if not self.lines:
            write(("\n  ]" if self._rows else "]") + "," + json.dumps(self.tail, indent=2, allow_nan=False)[1:] + "\n")

    def fail(self, message: str) -> None:
        """Tell a failure, {"error": message}, in what was begun or as the only thing."""
        if not self.wanted:
            return
        if self.lines:
            write(json.dumps({"error": message}) + "\n")
        elif self._rows >= 0:
            self.tail["error"] = message
            self.end()
        else:
            print_json({"error": message})
