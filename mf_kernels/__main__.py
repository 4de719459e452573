"""`python -m mf_kernels [--json]`: which operator has which kernel on this machine, and why not."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from mf_kernels import _native, status


def main() -> int:
    """Print the table of `mf_kernels.status()`, or the same as JSON with the build record; the exit code."""
    parser = _Parser(prog="python -m mf_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON: the rows and the build record")
    as_json = parser.parse_args().json
    rows = status()
    if as_json:
        return _say(json.dumps({"kernels": rows, "build": _native.build_record()}, indent=2))
    lines = []
    for row in rows:
        mark = "auto" if row["automatic"] else "yes" if row["available"] else "no"
        told = row["built_with"] if row["available"] else row["reason"]
        lines.append(f"{row['op']:18} {row['device']:5} {row['backend']:7} {mark:5} {told}")
    return _say("\n".join(lines))


class _Parser(argparse.ArgumentParser):
    """Wrong usage as everywhere: one line, and with --json an object."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} ({self.prog} --help tells more)", file=sys.stderr)
        if "--json" in sys.argv:
            _say(json.dumps({"error": message}))
        sys.exit(2)


def _say(text: str) -> int:
    """Text to standard output; 1 where it takes none: closed, full, or its reader gone, which alone is no error."""
    if sys.stdout is None:
        print("error: standard output is closed", file=sys.stderr)
        return 1
    try:
        print(text.encode(sys.stdout.encoding or "ascii", "backslashreplace").decode(sys.stdout.encoding or "ascii"))
        sys.stdout.flush()
    except OSError as error:
        # Python would try the same again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if code := main():
        sys.exit(code)
