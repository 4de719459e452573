"""This checkout against another one, row by row, in turns: is anything slower than it was?

    python benchmarks/against.py ../before                # both built in place (`make build`), one thread
    python benchmarks/against.py ../before --only network --save

Two processes, one for each checkout, hold the same rows: every timed operator forward and backward in both layouts,
and whole networks in evaluation, on the engine, and in a training step. A row is timed in one, then in the other, then
again, so that a machine whose speed drifts does so for both. A ratio is the minimum now over the minimum before. A row
that comes out slower than `--slower` is given further turns, up to `--turns-at-most`, in processes started anew, since
where a process has its memory decides a few per cent; and once more when all are done, since a neighbour's work lasts
for minutes. A minimum only falls: what is truly slower stays so.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.004  # a sample is as many calls as last about this long
NETWORKS = {"evaluation": (1, 224), "engine": (1, 224), "engine of 8": (8, 224), "training": (8, 128)}


class Side:
    """One checkout, in a process of its own that times what it is told to."""

    def __init__(self, checkout: Path, threads: int) -> None:
        self._checkout, self._threads = checkout, threads
        self.start()

    def start(self) -> None:
        """Start the process and take its description."""
        environment = os.environ | {"PYTHONPATH": str(self._checkout), "OMP_NUM_THREADS": str(self._threads)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--threads", str(self._threads)]
        self._process = subprocess.Popen(
            command, cwd=self._checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.described = self._answer()

    def start_anew(self) -> None:
        """The same with other places in memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self.start()

    def time(self, row: str) -> float:
        """Milliseconds a call, one sample."""
        assert self._process.stdin is not None
        self._process.stdin.write(row + "\n")
        self._process.stdin.flush()
        return self._answer()["ms"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"against: a side ended with exit code {self._process.wait()}")
        return json.loads(line)


def serve(threads: int) -> None:
    """The process of one side: a description, then a line of milliseconds for each name that it reads."""
    import torch

    import mf_kernels
    import mobileformer
    from mf_kernels import testing

    torch.set_num_threads(threads)
    names = [f"operator {case.id} {direction} {layout}" for case, direction, layout in _operators(testing)]
    names += [f"network {variant} {what}" for variant in mobileformer.VARIANTS for what in NETWORKS]
    library = Path(mf_kernels.__file__).with_name("_cpu.so")
    print(json.dumps({"rows": names, "package": str(library.parent), "built": library.is_file()}), flush=True)
    for line in sys.stdin:
        run, calls = _prepared(line.strip())
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        print(json.dumps({"ms": (time.perf_counter_ns() - start) / calls / 1e6}), flush=True)


def _operators(testing: Any) -> Iterator[tuple[Any, str, str]]:
    for case in testing.TIMED:
        for direction in ("forward", "backward"):
            for layout in ("contiguous", "channels_last"):
                yield case, direction, layout


@functools.lru_cache(maxsize=1)  # the turns of one row follow each other
def _prepared(name: str) -> tuple[Callable[[], object], int]:
    """What is timed, warm, and how many calls make a sample."""
    kind, _, told = name.partition(" ")
    run = _operator(told) if kind == "operator" else _network(*told.split(" ", 1))
    for _ in range(3):
        run()
    start = time.perf_counter()
    run()
    return run, max(1, round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))


def _operator(told: str) -> Callable[[], object]:
    import torch

    import mf_kernels
    from mf_kernels import testing

    label, direction, layout = told.rsplit(" ", 2)
    case = next(case for case in testing.TIMED if case.id == label)
    inputs, function = case.inputs(torch.float32, layout=layout), case.function(mf_kernels)
    if direction == "forward":
        return torch.no_grad()(functools.partial(function, **inputs))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    output, d_output = function(**leaves), case.d_output(torch.float32, layout=layout)
    return functools.partial(torch.autograd.grad, output, list(leaves.values()), d_output, retain_graph=True)


def _network(variant: str, what: str) -> Callable[[], object]:
    import torch

    import mobileformer

    batch, side = NETWORKS[what]
    torch.manual_seed(0)
    model = mobileformer.Model(variant)
    x = torch.randn(batch, 3, side, side)
    if what != "training":
        served = model.eval() if what == "evaluation" else model.eval().to_inference(threads=1)
        return torch.inference_mode()(functools.partial(served, x))
    labels = torch.arange(batch)

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()

    return step


def compare(now: Side, before: Side, rows: list[str], turns: int, at_most: int, slower: float) -> Iterator[dict]:
    """{"row", "now_ms", "before_ms", "ratio", "turns"} of each row: minima over turns, the order changing each turn."""
    for row in rows:
        times: dict[Side, float] = {now: float("inf"), before: float("inf")}
        turn = 0
        while turn < turns or (turn < at_most and times[now] > slower * times[before]):
            for side in (now, before) if turn % 2 else (before, now):
                times[side] = min(times[side], side.time(row))
            turn += 1
            if turn % turns == 0 and turn < at_most and times[now] > slower * times[before]:
                now.start_anew()
                before.start_anew()
        yield {
            "row": row,
            "now_ms": float(f"{times[now]:.5g}"),
            "before_ms": float(f"{times[before]:.5g}"),
            "ratio": round(times[now] / times[before], 3),
            "turns": turn,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout, built in place")
    parser.add_argument("--only", default="", help="rows whose name has this regular expression")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turns-at-most", type=int, default=120)
    parser.add_argument("--slower", type=float, default=1.03, help="the ratio above which a row counts as slower")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<machine>-against.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.threads)
        return
    if options.before is None or not (options.before / "mf_kernels").is_dir():
        parser.error(f"before: expected a checkout of this project, got {options.before}")
    now, before = Side(ROOT, options.threads), Side(options.before.resolve(), options.threads)
    for side in (now, before):
        if not side.described["built"]:
            parser.error(f"{side.described['package']}: no compiled library; run `make build` there")
    known = set(before.described["rows"])
    rows = [row for row in now.described["rows"] if row in known and re.search(options.only, row)]
    started = time.time()
    results = []
    for result in compare(now, before, rows, options.turns, options.turns_at_most, options.slower):
        results.append(result)
        mark = "  slower" if result["ratio"] > options.slower else ""
        print(f"{result['ratio']:6.3f}  {result['now_ms']:9.4f} ms  {result['row']}{mark}", flush=True)
    for place, result in enumerate(results):
        if result["ratio"] > options.slower:
            (again,) = compare(now, before, [result["row"]], options.turns, options.turns_at_most, options.slower)
            both = {key: min(result[key], again[key]) for key in ("now_ms", "before_ms")}
            ratio = round(both["now_ms"] / both["before_ms"], 3)
            results[place] = result | both | {"ratio": ratio, "turns": result["turns"] + again["turns"]}
            print(f"{ratio:6.3f}  {both['now_ms']:9.4f} ms  {result['row']}, once more", flush=True)
    slower = [result for result in results if result["ratio"] > options.slower]
    print(f"{len(results)} rows, {len(slower)} more than {options.slower - 1:.0%} slower")
    if options.save:
        print(f"written: {_save(results, options, started)}")
    raise SystemExit(1 if slower else 0)


def _save(results: list[dict], options: argparse.Namespace, started: float) -> Path:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import harness

    described = harness.environment("cpu")
    slug = re.sub(r"[^a-z0-9]+", "-", str(described["cpu"]).lower()).strip("-")
    other = subprocess.run(["git", "rev-parse", "HEAD"], cwd=options.before, capture_output=True, text=True)
    header = {
        "format": 1,
        "environment": described,
        "before": other.stdout.strip() or None,
        "threads": options.threads,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds"),
        "seconds": round(time.time() - started),
    }
    path = ROOT / "benchmarks" / "results" / f"{slug}-against.json"
    with harness.replacing(path) as temporary:
        temporary.write_text(harness.as_lines(header, results), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
