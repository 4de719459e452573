"""Compile every Triton kernel at the launches of the model and of the tests, without a GPU: what each one needs.

    python benchmarks/triton_resources.py                                    # with the Triton of the environment
    PYTHONPATH=build/triton-3.6 python benchmarks/triton_resources.py        # with the other one; `make test` gets it
    python benchmarks/triton_resources.py --page                             # docs/triton.md again, from the files

Each writes benchmarks/results/triton-resources-<version>.json and docs/triton.md. What is compiled: `CONFIGURATIONS`,
forward and backward, each distinct kernel once. Takes ten minutes on one core.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton_launches import launches_of, resources, settings

import mf_kernels
import mobileformer
from mf_kernels._triton import has_kernels
from mf_kernels.testing import CASES, Case
from mf_kernels.triton._launch import Launch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "mf_kernels" / "triton"
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "docs" / "triton.md"
VERSIONS = ("3.6", "3.9")  # of torch 2.11, and of the torch that is tested here
# a batch of None is the row's own
CONFIGURATIONS = tuple(
    {"rows": rows, "arch": arch, **form, "batch": batch if rows == "layers" else None}
    for rows in ("layers", "tests")
    for form, batch in (
        ({"dtype": "bfloat16", "channels_last": True}, 128),
        ({"dtype": "float32", "channels_last": False}, 1),
    )
    for arch in (90, 80)
)
NEEDS = ("registers", "spilled_bytes", "shared_bytes", "loads", "stores")


def path_of(version: str) -> Path:
    """`version` as in 3.6 or 3.6.0."""
    return RESULTS / f"triton-resources-{'.'.join(version.split('.')[:2])}.json"


@functools.cache  # four configurations have the same rows, and it takes seven networks to find them
def cases_of(rows: str) -> tuple[Case, ...]:
    """Rows of operators: "layers", of every variant at 224 x 224, or "tests", those that are there for a branch."""
    if rows == "tests":
        return tuple(case for case in CASES if has_kernels(case.op) and not case.layer_of and case.shapes["x"][0])
    return tuple({case.id: case for variant in mobileformer.VARIANTS for case in layers_of(variant)}.values())


def layers_of(variant: str) -> Iterator[Case]:
    """What one image through a variant calls, in evaluation and in training; joined operators as what they join."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    with contextlib.ExitStack() as patches, torch.device("meta"):
        for op in ("mobile_to_former", "former_to_mobile", "former_to_mobile_", "dynamic_relu", "dynamic_relu_",
                   "spatial_dynamic_relu", "spatial_dynamic_relu_", "depthwise_conv2d", "depthwise_dynamic_relu",
                   "batch_norm_activation"):  # fmt: skip
            patches.enter_context(mock.patch.object(mf_kernels, op, recorder(calls, op, getattr(mf_kernels, op))))
        for spatial in (False, True):
            model = mobileformer.Model(variant, spatial_dynamic_relu=spatial)
            for training in (False, True):
                model.train(training)
                with torch.set_grad_enabled(training):
                    model(torch.empty(2, 3, 224, 224))
    for op, tensors, options in calls:
        x, *others = (tuple(t.shape) if t is not None else None for t in tensors)
        if op == "depthwise_dynamic_relu":
            weight, bias, theta = others
            C, stride = weight[0], options["stride"]
            yield case("depthwise_conv2d", x, (weight, bias), {"stride": stride, "activation": "identity"})
            yield case("dynamic_relu", (x[0], C, -(-x[2] // stride), -(-x[3] // stride)), (theta,), {})
        elif op == "batch_norm_activation":
            if options["theta"] is not None:
                yield case("dynamic_relu", x, (tuple(options["theta"].shape),), {})
        else:
            yield case(op.removesuffix("_"), x, others, options)


def recorder(calls: list[Any], op: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which notes its calls as (op, positional arguments, options)."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        calls.append((op, arguments, options))
        return function(*arguments, **options)

    return call


def case(op: str, x: tuple[int, ...], others: Sequence[tuple[int, ...] | None], options: dict[str, Any]) -> Case:
    """The row of an operator whose first argument has the shape `x`."""
    names = {"mobile_to_former": ["q"], "former_to_mobile": ["k", "v"], "dynamic_relu": ["theta"],
             "spatial_dynamic_relu": ["theta", "alpha"], "depthwise_conv2d": ["weight", "bias"]}[op]  # fmt: skip
    shapes = {"x": x} | {n: shape for n, shape in zip(names, others, strict=False) if shape is not None}
    name = "-".join(["x".join(map(str, shape)) for shape in shapes.values()] + [str(o) for o in options.values()])
    return Case(op, name, shapes, "a layer", options)


def rows() -> Iterator[tuple[dict[str, Any], Launch]]:
    """Each distinct kernel and setting once, with the first row that launches it, and that launch."""
    seen = set()
    for configuration in CONFIGURATIONS:
        arch, batch, channels_last = (configuration[key] for key in ("arch", "batch", "channels_last"))
        dtype = getattr(torch, configuration["dtype"])
        for case in cases_of(configuration["rows"]):
            batch_of_row = case.shapes["x"][0] if batch is None else batch
            for call in launches_of(case, dtype, channels_last=channels_last, batch=batch_of_row, arch=arch):
                kernel = {"kernel": call.kernel.__name__, "arguments": specialized(call), "settings": settings(call)}
                key = json.dumps([arch, kernel], sort_keys=True)
                if key not in seen:
                    seen.add(key)
                    yield {"op": case.op, "row": case.name, **configuration, **kernel}, call


def specialized(call: Launch) -> str:
    """What a compilation knows of the arguments: dtypes, None, and integers that are 1 or whole sixteens."""
    told = {torch.float32: "f", torch.float16: "h", torch.bfloat16: "b"}
    return "".join(
        told[value.dtype]
        if isinstance(value, Tensor)
        else "-"
        if value is None
        else "1"
        if value == 1
        else ("x" if value % 16 == 0 else "i") + ("64" if value >= 2**31 else "")
        for value in call.arguments.values()
    )


def sources() -> str:
    """A digest of the kernels' code; comments, docstrings and what launches them do not count."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
                digest.update(ast.unparse(node).encode())
    return digest.hexdigest()


def main() -> None:
    """Write both files, each to a temporary name first."""
    if sys.argv[1:] != ["--page"]:
        head = {"triton": triton.__version__, "sources": sources()}
        table = []
        for row, call in rows():
            table.append(row | resources(call, row["arch"]))
            print(f"\r{len(table)} kernels", end="", file=sys.stderr, flush=True)
        lines = ",\n".join(json.dumps(row) for row in table)
        _write(path_of(triton.__version__), json.dumps(head)[:-1] + f', "kernels": [\n{lines}\n]}}\n')
    written = [json.loads(path_of(v).read_text()) for v in VERSIONS if path_of(v).is_file()]
    _write(TABLE, markdown(written))


def markdown(written: list[dict[str, Any]]) -> str:
    """The tables for people: one line for each kernel of each configuration, its heaviest setting."""
    lines = [
        "# Triton kernels: what they need",
        "",
        "Written by `python benchmarks/triton_resources.py`, which compiles for real and needs no card. The kernels",
        "are executed in Triton's interpreter and not yet timed on a card. Each line is the worst over a kernel's",
        "settings: most registers, spilled bytes and shared memory, fewest bytes that one load or store of a thread",
        "moves at its widest. Layers are those of the seven variants at 224 x 224; tests are the rows that are there",
        "for a branch.",
    ]
    for result in written:
        name = path_of(result["triton"]).name
        lines += [
            "",
            f"## Triton {result['triton']}",
            "",
            f"Every setting is in [{name}](../benchmarks/results/{name}).",
            "",
            "| kernel | sm | rows, dtype, layout, batch | settings | registers | spilled | shared | load | store |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in result["kernels"]:
            layout = "channels_last" if row["channels_last"] else "contiguous"
            what = f"{row['rows']}, {row['dtype']}, {layout}, {row['batch'] or 'their own'}"
            groups.setdefault((row["kernel"], row["arch"], what), []).append(row)
        for (kernel, arch, what), group in sorted(groups.items()):
            numbers = [
                len(group),
                *(max(row[key] for row in group) for key in ("registers", "spilled_bytes", "shared_bytes")),
                *(min(max(int(width) for width in row[key]) for row in group) for key in ("loads", "stores")),
            ]
            lines.append(f"| {kernel} | {arch} | {what} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
