"""`python -m mf_kernels [--json]`: which operator has which kernel on this machine, and why not."""

from __future__ import annotations

import argparse
import json

from mf_kernels import _native, status


def main() -> None:
    """Print the table of `mf_kernels.status()`, or the same as JSON with the build record."""
    parser = argparse.ArgumentParser(prog="python -m mf_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON: the rows and the build record")
    as_json = parser.parse_args().json
    rows = status()
    if as_json:
        print(json.dumps({"kernels": rows, "build": _native.build_record()}, indent=2))
        return
    for row in rows:
        mark = "auto" if row["automatic"] else "yes" if row["available"] else "no"
        told = row["built_with"] if row["available"] else row["reason"]
        print(f"{row['op']:18} {row['device']:5} {row['backend']:7} {mark:5} {told}")


if __name__ == "__main__":
    main()
