"""What the design rests on: operators of an image, what a call, a layout and a header cost. Written to docs/costs.md.

    python benchmarks/costs.py            # measure: benchmarks/results/<machine>-costs.json, then the page; two minutes
    python benchmarks/costs.py --page     # the page again, from the files

One thread, contenders in turns, minima.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, environment
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mf_kernels
import mobileformer
from mobileformer.files.replacing import replacing
from mobileformer.measure.timing import interleaved

RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/costs.md"
VARIANT = "294m"
# Views compute nothing, and memory is asked for by those who fill it.
NO_WORK = ("aten._unsafe_view", "aten.empty")


class Counting(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and not name.startswith(NO_WORK):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operators() -> dict[str, int]:
    """Operators of one 224 x 224 image, by the way it is computed."""
    x, found = torch.zeros(1, 3, 224, 224), {}
    fused = mobileformer.Model(VARIANT).eval()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "plain PyTorch": mobileformer.Model(VARIANT, use_fused=False).eval(),
        "fused": fused,
        "the folded network in PyTorch": fused.to_inference(),
    }
    for name, network in ways.items():
        with torch.no_grad(), Counting() as counting:
            network(x)
        found[name] = counting.counts.total()
        if name == "fused":
            found["fused: of these fold a BatchNorm"] = counting.counts["mf_kernels.fold_batch_norm.native"]
    return found


def calls() -> dict[str, float]:
    """Microseconds of one call on a map of 16 values, where the kernel itself is nothing."""
    x, theta = torch.randn(1, 4, 2, 2), torch.randn(1, 8)
    d_y, wanting = torch.ones_like(x), x.clone().requires_grad_()
    raw = torch.ops.mf_kernels.dynamic_relu_fwd.native

    @torch.library.custom_op("costs::dynamic_relu", mutates_args=())
    def custom(x: Tensor, theta: Tensor) -> Tensor:
        return raw(x, theta)

    def setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.mf_kernels.dynamic_relu_bwd.native(d_y, *ctx.saved_tensors)

    custom.register_autograd(backward, setup_context=setup)
    public = mf_kernels.dynamic_relu

    timings = interleaved(
        {
            "the dispatcher's operator": lambda: raw(x, theta),
            "the public function, with its checks": lambda: public(x, theta),
            "the same kernel as torch.library.custom_op": lambda: custom(x, theta),
            "with a gradient: the public function": lambda: public(wanting, theta).backward(d_y),
            "with a gradient: torch.library.custom_op": lambda: custom(wanting, theta).backward(d_y),
        },
        repeats=200,
        min_sample_ms=0.2,
    )
    return {name: 1e3 * timing.min_ms for name, timing in timings.items()}


def inference() -> dict[str, float]:
    """Microseconds by which a copy made for inference is slower than its engine alone."""
    copy, x = mobileformer.Model("26m").eval().to_inference(threads=1), torch.randn(1, 3, 32, 32)
    copy(x)
    engine, array = copy.engine, x.numpy()
    assert engine is not None
    times = interleaved({"copy": lambda: copy(x), "engine": lambda: engine(array)}, repeats=300)
    return {"a call of the copy beside the engine's own": 1e3 * (times["copy"].min_ms - times["engine"].min_ms)}


def layouts() -> dict[str, float]:
    """channels_last over planes, in time, of the grouped 1 x 1 convolutions of 26m."""
    told = {}
    for inputs, outputs, groups, side in ((12, 36, 4, 56), (36, 12, 4, 56), (24, 72, 4, 28), (96, 576, 4, 7)):
        layer = nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False).requires_grad_(False)
        x = torch.randn(1, inputs, side, side)
        last = x.contiguous(memory_format=torch.channels_last)
        times = interleaved(
            {"planes": lambda x=x, f=layer: f(x), "last": lambda x=last, f=layer: f(x)}, repeats=50, min_sample_ms=1.0
        )
        told[f"{inputs} to {outputs} channels in {groups} groups, {side} x {side}"] = (
            times["last"].min_ms / times["planes"].min_ms
        )
    return told


def headers() -> dict[str, float]:
    """Seconds of processor time for a file of nothing but these headers."""
    from torch.utils import cpp_extension

    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    told = {}
    for name, lines, switches in (
        (
            "the stable interface",
            ("torch/csrc/stable/library.h", "torch/csrc/stable/tensor.h"),
            ("-DTORCH_TARGET_VERSION=0x020a000000000000",),
        ),
        ("torch/all.h", ("torch/all.h",), ()),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.write_text("".join(f"#include <{line}>\n" for line in lines))
            began = time.perf_counter()
            command = ["c++", "-std=c++20", "-O2", *switches, *paths]
            subprocess.run([*command, "-c", str(source), "-o", f"{folder}/empty.o"], check=True)
            told[name] = time.perf_counter() - began
    return told


TABLES = (
    (operators, f"Operators of a 224 x 224 image through {VARIANT}, views and bare memory left out", "operators", "{}"),
    (calls, "A call of dynamic ReLU on 16 values", "us", "{:.1f}"),
    (inference, "What a copy made by `to_inference` adds to its engine", "us", "{:.1f}"),
    (layouts, "Grouped 1 x 1 convolutions of PyTorch: channels_last against planes", "times as long", "{:.1f}"),
    (headers, "Compiling a file of headers alone", "s", "{:.1f}"),
)


def main() -> None:
    """Measure, unless only the page is wanted; both files are written whole."""
    if sys.argv[1:] != ["--page"]:
        torch.set_num_threads(1)
        told = environment("cpu")
        slug = re.sub(r"[^a-z0-9]+", "-", str(told["cpu"]).lower()).strip("-")
        costs = {}
        for measure, *_ in TABLES:
            costs[measure.__name__] = measure()
            print(measure.__name__, costs[measure.__name__], file=sys.stderr)
        with replacing(RESULTS / f"{slug}-costs.json") as temporary:
            temporary.write_text(json.dumps({"environment": told} | costs, indent=1) + "\n", encoding="utf-8")
    with replacing(PAGE) as temporary:
        temporary.write_text(page(sorted(RESULTS.glob("*-costs.json"))), encoding="utf-8")


def page(paths: list[Path]) -> str:
    """The tables for people, one column for each machine."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [
        "# What things cost",
        "",
        "Measured facts that `docs/design.md` rests on. Written by `python benchmarks/costs.py`: one thread,",
        "contenders in turns, minima.",
        "",
        "| | machine | torch | commit | file |",
        "|---|---|---|---|---|",
    ]
    for number, (path, result) in enumerate(zip(paths, results, strict=True), 1):
        told = result["environment"]
        link = f"[{path.name}](../benchmarks/results/{path.name})"
        lines.append(f"| {number} | {told['cpu']} | {told['torch']} | {str(told['commit'])[:9]} | {link} |")
    for measure, title, unit, form in TABLES:
        columns = " | ".join(f"{unit}, {number}" for number in range(1, len(results) + 1))
        lines += ["", f"## {title}", "", f"| | {columns} |", "|---" * (len(results) + 1) + "|"]
        for name in results[0][measure.__name__]:
            values = [form.format(result[measure.__name__][name]) for result in results]
            lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
