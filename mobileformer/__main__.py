"""`python -m mobileformer` is the command `mobileformer`."""

from __future__ import annotations

from mobileformer.cli import main

if __name__ == "__main__":
    main()
