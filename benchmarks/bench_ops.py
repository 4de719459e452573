"""Every operator at the shapes it has in the networks at 224 x 224, forward and backward, against plain PyTorch.

One thread unless said, float32, batch 1. The forward pass runs without gradients; the backward pass is the
gradients of all inputs from that of the output, alone. Inputs are warm: in a network they have just been written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import expected
import forms
import harness
import pytest
import torch
import torch._functorch.config
from harness import Row
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import mf_kernels
from mf_kernels import reference, testing

DTYPE = torch.float32
COMPILED = "294m"  # the variant whose operators are compiled too; every shape is a compilation
LAYOUTS = ("contiguous", "channels_last")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [
        pytest.param(case, direction, device, backend, layout, id=f"{case.id}-{direction}-{device}-{backend}-{layout}")
        for device, kernels in harness.devices(metafunc.config.option.device).items()
        for case, direction in groups(device)
        for backend, layout in contenders(case, tuple(kernels.get(case.op, kernels["depthwise_conv2d"])))
    ]
    metafunc.parametrize(("case", "direction", "device", "backend", "layout"), rows)


def groups(device: str) -> Iterator[tuple[testing.Case, str]]:
    for case in testing.TIMED:
        yield from ((case, "forward"), (case, "backward"))
    if device == "cpu":  # elsewhere the inference forms are the operators one after the other
        yield from ((form, "forward") for form in forms.FORMS)


def contenders(case: testing.Case, backends: tuple[str, ...]) -> list[tuple[str, str]]:
    """(backend, layout) of a row's contenders; without a map in its arguments there is one layout."""
    layouts = LAYOUTS if "x" in case.shapes else LAYOUTS[:1]
    compiled = COMPILED in case.layer_of and case.op != "token_side"
    return [
        *((harness.EAGER, layout) for layout in layouts),
        *([("compile", "contiguous")] if compiled else []),
        *((backend, layout) for backend in backends for layout in layouts),
    ]


def test_operator(
    benchmark: BenchmarkFixture,
    recorder: harness.Recorder,
    case: testing.Case,
    direction: str,
    device: str,
    backend: str,
    layout: str,
) -> None:
    rows = measured(case, direction, device)
    recorder.record(benchmark, rows[backend, layout], list(rows.values()))


@functools.lru_cache(maxsize=1)  # the rows of one group follow each other
def measured(case: testing.Case, direction: str, device: str) -> dict[tuple[str, str], Row]:
    """All contenders of one group, checked, and those that are right timed in turns."""
    torch.compiler.reset()  # or the limit of recompilations of one function is reached
    kernels = harness.devices(device)[device]
    backends = tuple(kernels.get(case.op, kernels["depthwise_conv2d"]))
    rows = {}
    for backend, layout in contenders(case, backends):
        several = len(backends) > 1
        rows[backend, layout] = build(case, direction, device, backend, layout, several_backends=several)
    repeats = 20 if COMPILED in case.layer_of else 10
    harness.time_in_turns(list(rows.values()), repeats=repeats, min_sample_ms=1.0, device=device)
    return rows


def build(case: testing.Case, direction: str, device: str, backend: str, layout: str, *, several_backends: bool) -> Row:
    """One contender, run once and compared with the float64 reference."""
    inputs = case.inputs(DTYPE, layout=layout, device=device)
    is_fused = backend not in (harness.EAGER, "compile")
    function = case.function(mf_kernels if is_fused else reference)
    if backend == "compile":
        function = torch.compile(function, fullgraph=True, dynamic=False)
    choose = functools.partial(mf_kernels.use_backend, backend) if is_fused else nullcontext
    facts = {
        "suite": "operators",
        "op": case.op,
        "case": case.name,
        "variants": " ".join(case.layer_of),
        "direction": direction,
        "batch": next(iter(case.shapes.values()))[0],
        "device": device,
        "backend": backend,
        "layout": layout,
        "dtype": str(DTYPE).removeprefix("torch."),
        "bytes": expected.minimal_bytes(case, direction, DTYPE),
        "flops": expected.flops(case, direction),
    }
    row = Row(facts, run=_not_built, calls=torch.no_grad if direction == "forward" else nullcontext)
    try:
        with choose():
            run, name_results = _prepared(case, direction, function, inputs, layout, device)
        # Choosing costs a microsecond: only where `auto` has a choice is it inside what is timed.
        row.run = _under(choose, run) if several_backends and is_fused and direction == "forward" else run
        with row.calls(), mf_kernels.record_kernels() as record:
            results = name_results(row.run())
        kernel = expected.kernel(case, direction, backend, device) if is_fused else None
        facts["kernel"] = expected.check_served(record.counts, kernel)
        facts["share_of_error_allowed"] = share = expected.share_of_error_allowed(case, DTYPE, results)
        if is_fused:
            testing.assert_within_budget(case, DTYPE, results)
        elif not share <= expected.PEERS_SHARE:
            most = expected.PEERS_SHARE
            raise AssertionError(f"its error is {share:.1f} times what a kernel may have, expected {most} at most")
    except (AssertionError, RuntimeError) as error:  # wrong, or torch.compile without a compiler
        row.error = f"{type(error).__name__}: {error}"
    return row


def _prepared(
    case: testing.Case,
    direction: str,
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    layout: str,
    device: str,
) -> tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]:
    """What is timed, and what names its results as `testing.evaluate` does."""
    if direction == "forward":
        return functools.partial(function, **inputs), lambda output: {"output": output.cpu()}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    # Backward runs many times on one graph, which compiled code that frees its buffers early would refuse.
    with torch._functorch.config.patch(donated_buffer=False):
        output = function(**leaves)
        d_output = case.d_output(DTYPE, layout=layout, device=device)
        run = functools.partial(torch.autograd.grad, output, list(leaves.values()), d_output, retain_graph=True)
        run()
    return run, lambda gradients: {f"d_{name}": d.cpu() for name, d in zip(leaves, gradients, strict=True)}


def _under(choose: Callable[[], AbstractContextManager[Any]], run: Callable[[], Any]) -> Callable[[], Any]:
    def run_chosen() -> Any:
        with choose():
            return run()

    return run_chosen


def _not_built() -> None:
    raise RuntimeError("a contender that could not be built is not run")
