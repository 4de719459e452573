"""Writes the table of what `auto` takes on CUDA anew, from what a card measured.

    python benchmarks/preference.py benchmarks/results/<device>/operators.json

An operator's native kernel comes first if every one of its rows was right and was timed beside Triton's, and it was
faster: by more than NOISE, as the geometric mean over all shapes, layouts, passes and dtypes that both have. What is
not decided so keeps its order, and the file stands beside every operator that it has rows of.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from reading import load

from mf_kernels._preference import CUDA, OPS, UNMEASURED, Preference
from mobileformer.files.replacing import replacing

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "mf_kernels" / "_preference.py"
NOISE = 1.02  # what is nearer to one than this is no difference
KEYS = ("case", "layout", "direction", "dtype")


def decide(result: dict[str, Any], file: str) -> dict[str, Preference]:
    """The order for every operator. Raises ValueError where the result can justify none."""
    environment = result["environment"]
    if result.get("dry") or "gpu" not in environment:
        raise ValueError(f"{file}: expected a result of a card, got one of {environment.get('cpu')}")
    if environment["kernels_older_than_sources"]:
        raise ValueError(f"{file}: the kernels were older than their sources")
    return {op: order(result, op, file) or CUDA.get(op, UNMEASURED) for op in OPS}


def order(result: dict[str, Any], op: str, file: str) -> Preference | None:
    """The order for one operator, None where no shape was measured on both backends."""
    times: dict[str, dict[tuple[str, ...], float]] = {"native": {}, "triton": {}}
    for row in result["rows"]:
        if row["op"] == op and row["backend"] in times:
            times[row["backend"]][tuple(row[key] for key in KEYS)] = row["median_ms"]
    both = times["native"].keys() & times["triton"].keys()
    if not both:
        return None
    wrong = any(row["op"] == op and row["backend"] == "native" for row in result["failed"])
    gain = math.exp(sum(math.log(times["triton"][key] / times["native"][key]) for key in both) / len(both))
    first = "native" if gain > NOISE and not wrong else "triton"
    return Preference((first, "native" if first == "triton" else "triton"), file)


def rewritten(source: str, preferences: dict[str, Preference]) -> str:
    """The module's text with the table replaced."""
    lines = []
    for op, (backends, file) in preferences.items():
        order = ", ".join(f'"{backend}"' for backend in backends)
        justification = "None" if file is None else f'"{file}"'
        lines.append(f'    "{op}": Preference(({order}), {justification}),')
    table = "\n".join(["CUDA = {", *lines, "}", ""])
    text, count = re.subn(r"^CUDA = \{\n.*?^\}\n", lambda _: table, source, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise ValueError(f"expected one table CUDA in the source, found {count}")
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="operators.json of `make gpu`, in this repository")
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="the module that is written (mf_kernels/_preference.py)"
    )
    options = parser.parse_args(arguments)
    file = options.file.resolve().relative_to(ROOT).as_posix()
    preferences = decide(load(options.file), file)
    with replacing(options.table) as temporary:
        temporary.write_text(rewritten(TABLE.read_text(encoding="utf-8"), preferences), encoding="utf-8")
    for op, preference in preferences.items():
        print(f"{op:18} {', then '.join(preference.backends)}{'' if preference.justified_by else ' (not measured)'}")


if __name__ == "__main__":
    main()
