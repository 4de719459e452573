"""Run a script of timm, say its train.py or validate.py, in which the seven sizes are registered.

python -m mobileformer.timm train.py DATA --model mobileformer_294m ...
torchrun --nproc_per_node 8 -m mobileformer.timm train.py DATA --model mobileformer_294m ...
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

USAGE = "usage: python -m mobileformer.timm SCRIPT [ARGUMENTS]"


def main() -> None:
    """Arguments from the command line. The package that this module lies in has registered the sizes."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        _refuse("expected a script of timm")
    script = sys.argv[1]
    if not os.path.isfile(script):
        _refuse(f"{script}: no such file")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as where the script is started by itself
    runpy.run_path(script, run_name="__main__")


def _refuse(message: str) -> NoReturn:
    text = f"error: {message} ({USAGE})"
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
