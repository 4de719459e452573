"""Every operator at the shapes of the networks, in bfloat16 and float32, against float64 and the copy ceiling.

A group is one operator, shape, pass and dtype; its contenders take turns. A call's inputs were not touched for three
times the second-level cache, its outputs have a place of their own. Backward is the gradients of all inputs alone.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import expected
import torch
import torch._functorch.config
from torch import Tensor

import mf_kernels
from gpu import machine
from gpu.graphs import Replay, lane, sets_for, timed
from gpu.section import BrokenDevice, Section
from mf_kernels import reference, testing

BATCH = 256
FIRST, OTHERS = "294m", ("508m", "26m")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DIRECTIONS = ("forward", "backward")
LAYOUTS = ("contiguous", "channels_last")
BACKENDS = ("triton", "native")
# Share of the copy ceiling that a kernel is to reach, where it moves enough for a launch not to count
TARGETS = {
    "mobile_to_former": {"forward": 0.85, "backward": 0.75},
    "former_to_mobile": {"forward": 0.85, "backward": 0.75},
    "dynamic_relu": {"forward": 0.90, "backward": 0.85},
    "spatial_dynamic_relu": {"forward": 0.80, "backward": 0.60},
    "depthwise_conv2d": {"forward": 0.75, "backward": 0.60},
}


@dataclass(frozen=True, eq=False)
class DeviceCase(testing.Case):
    """A row with another batch, whose values are drawn where they are used: the reference runs there too."""

    device: str = "cuda"

    def inputs(
        self, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0, device: str | None = None
    ) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        spreads = {"theta": 2.0, "weight": 2.0 / self.shapes.get("weight", (1,))[-1]}
        drawn = {name: self._draw(shape, generator, spreads.get(name, 1.0)) for name, shape in self.shapes.items()}
        if "alpha" in drawn:
            drawn["alpha"] = drawn["alpha"].softmax(1)
        return {name: testing.in_layout(values.to(dtype), layout) for name, values in drawn.items()}

    def d_output(
        self, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0, device: str | None = None
    ) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed + 1)
        return testing.in_layout(self._draw(self.output_shape, generator, 1.0).to(dtype), layout)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator, spread: float) -> Tensor:
        return spread * torch.randn(shape, generator=generator, device=self.device)


class Group(NamedTuple):
    case: DeviceCase
    direction: str
    dtype: str
    contenders: tuple[tuple[str, str], ...]  # backend, layout

    def label(self, contender: tuple[str, str]) -> str:
        kind = "compiled " if self.contenders == COMPILED else ""
        return f"{kind}{self.case.id} {self.direction} {self.dtype}: {' '.join(contender)}"


ALL = tuple((backend, layout) for backend in ("eager", *BACKENDS) for layout in LAYOUTS)
AS_THE_MODEL, PLANES = (tuple((backend, layout) for backend, layout in ALL if layout == kept) for kept in LAYOUTS[::-1])
# Minutes to compile: one shape of each operator, in turns with what it is compared with
COMPILED = (
    ("eager", "channels_last"),
    ("compile", "contiguous"),
    ("compile", "channels_last"),
    ("triton", "channels_last"),
    ("native", "channels_last"),
)


def groups(device: str, dry: bool, more: bool) -> list[Group]:
    """In the order of importance: what a budget cuts off is the end. `more` are those behind everything else."""
    if dry:
        cases = dry_cases(device)
        if not more:
            return [Group(case, direction, "bfloat16", AS_THE_MODEL) for case in cases for direction in DIRECTIONS]
        plain = [Group(cases[0], direction, "float32", ALL) for direction in DIRECTIONS]
        return [*plain, *(Group(cases[2], direction, "float32", COMPILED) for direction in DIRECTIONS)]
    first_cases, other_cases = (
        in_turns([batched(case, device) for case in testing.TIMED if chosen(case)])
        for chosen in (lambda case: FIRST in case.layer_of, lambda case: FIRST not in case.layer_of)
    )
    if not more:
        return [Group(c, direction, "bfloat16", AS_THE_MODEL) for c in first_cases for direction in DIRECTIONS]
    large = [first(case for case in first_cases if case.op == op and case.shapes["x"][2] == 56) for op in TARGETS]
    return [
        *(Group(c, direction, "float32", ALL) for c in first_cases for direction in DIRECTIONS),
        *(Group(c, direction, "bfloat16", COMPILED) for c in large for direction in DIRECTIONS),
        *(Group(c, direction, "bfloat16", PLANES) for c in first_cases for direction in DIRECTIONS),
        *(Group(c, direction, dtype, ALL) for dtype in DTYPES for c in other_cases for direction in DIRECTIONS),
    ]


def run(section: Section, device: str, dry: bool) -> None:
    ceiling = machine.copy_ceiling(section)
    section.header |= {"batch": BATCH, "copy_gb_per_s": ceiling, "targets": TARGETS}
    planned = groups(device, dry, more=section.header["section"].startswith("more"))
    section.plan([group.label(contender) for group in planned for contender in group.contenders])
    with lane(device):
        for group in planned:
            measure(group, section, ceiling, device)
            testing.expectation.cache_clear()  # gigabytes each
            gc.collect()


def measure(group: Group, section: Section, ceiling: float | None, device: str) -> None:
    """Build and check every contender that is not done, time those that are right in turns."""
    built: dict[str, tuple[dict[str, Any], Replay, int]] = {}
    torch.compiler.reset()
    for contender in group.contenders:
        label = group.label(contender)
        if section.done(label):
            continue
        facts = describe(group, contender, device)
        try:
            built[label] = (facts, *build(group, contender, device, facts))
        except Exception as error:  # noqa: BLE001 whatever a kernel, a compiler or a capture raises is its row's
            section.fail(label, facts, f"{type(error).__name__}: {str(error)[:2000]}")
            check_alive(device)
    runs = {label: replay for label, (_, replay, _) in built.items()}
    counts = {label: sets for label, (_, _, sets) in built.items()}
    timings = timed(runs, counts, device, repeats=10, sample_ms=2.0) if runs else {}
    plain = [t.median_ms for label, t in timings.items() if built[label][0]["backend"] == "eager"]
    for label, timing in timings.items():
        facts = built[label][0]
        rate = facts["bytes"] / timing.median_ms / 1e6
        target = TARGETS[facts["op"]][facts["direction"]] if facts["backend"] in BACKENDS else None
        section.add(
            label,
            facts
            | {"median_ms": timing.median_ms, "min_ms": timing.min_ms, "calls": timing.calls, "sets": counts[label]}
            | {"gb_per_s": rate, "share_of_copy": rate / ceiling if ceiling else None, "target": target}
            | {"against_eager": min(plain) / timing.median_ms if plain else None},
        )


def check_alive(device: str) -> None:
    """Raise BrokenDevice where an error outlives its row: an illegal access ends the process's use of the card."""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
            torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise BrokenDevice(str(error)) from None


def describe(group: Group, contender: tuple[str, str], device: str) -> dict[str, Any]:
    case, (backend, layout) = group.case, contender
    return {
        "suite": "operators",
        "op": case.op,
        "case": case.name,
        "variants": " ".join(case.layer_of),
        "direction": group.direction,
        "batch": case.shapes["x"][0],
        "device": device,
        "backend": backend,
        "layout": layout,
        "dtype": group.dtype,
        "bytes": expected.minimal_bytes(case, group.direction, DTYPES[group.dtype]),
        "flops": expected.flops(case, group.direction),
    }


def build(group: Group, contender: tuple[str, str], device: str, facts: dict[str, Any]) -> tuple[Replay, int]:
    """The calls of one contender and their number, once they are right; raises what is wrong with them."""
    case, dtype, (backend, layout) = group.case, DTYPES[group.dtype], contender
    fused = backend in BACKENDS
    function = case.function(mf_kernels if fused else reference)
    if backend == "compile":
        options = {"backend": "aot_eager"} if device == "cpu" else {}
        function = torch.compile(function, fullgraph=True, dynamic=False, **options)
    one, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout)
    sets = sets_for(facts["bytes"], device)
    copies = [one, *({name: t.clone() for name, t in one.items()} for _ in range(sets - 1))]
    if fused:
        function = under(backend, function)
    with mf_kernels.record_kernels() as record:
        replay = Replay(list(calls(function, copies, d_output, group.direction)), device)
        outputs = replay.outputs()
    kernel = expected.kernel(case, group.direction, backend, device) if fused else None
    served = {name: n for name, n in record.counts.items() if group.direction == "forward" or "_bwd:" in name}
    facts["kernel"] = expected.check_served(served, kernel)
    names = ("output",) if group.direction == "forward" else tuple(f"d_{name}" for name in one)
    results = dict(zip(names, outputs[0] if group.direction == "backward" else outputs[:1], strict=True))
    for name, tensor in results.items():
        if tensor.dtype != dtype:
            raise AssertionError(f"{name}: expected {dtype}, got {tensor.dtype}")
    allowed = testing.with_saved_exponents(case, dtype, testing.expectation(case, dtype))
    facts["share_of_error_allowed"] = share = expected.share_of_error_allowed(case, dtype, results, allowed)
    most = 1 if fused else expected.PEERS_SHARE
    if not share <= most:
        raise AssertionError(f"its error is {share:.3g} times the one allowed, expected {most} at most")
    if fused and not all(same_bits(outputs[0], other) for other in outputs[1:]):
        raise AssertionError("the same values gave different bits from one call to the next")
    return replay, sets


def calls(
    function: Callable[..., Tensor], copies: list[dict[str, Tensor]], d_output: Tensor, direction: str
) -> Iterator[Callable[[], Any]]:
    """One for each set of inputs."""
    if direction == "forward":
        function = torch.no_grad()(function)
        yield from (functools.partial(function, **one) for one in copies)
        return
    for one in copies:
        leaves = {name: tensor.requires_grad_() for name, tensor in one.items()}
        # Backward runs many times on one graph, which compiled code that frees its buffers early would refuse.
        with torch._functorch.config.patch(donated_buffer=False):
            output = function(**leaves)
            gradient = functools.partial(torch.autograd.grad, output, list(leaves.values()), retain_graph=True)
            yield functools.partial(gradient, d_output.clone())


def under(backend: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(**arguments: Tensor) -> Tensor:
        with mf_kernels.use_backend(backend):
            return function(**arguments)

    return call


def same_bits(one: Any, other: Any) -> bool:
    pairs = [(one, other)] if isinstance(one, Tensor) else zip(one, other, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def dry_cases(device: str) -> list[DeviceCase]:
    """One row of each operator with few taps and values: Triton's interpreter takes a millisecond for either's step."""

    def steps(case: testing.Case) -> tuple[int, int]:
        filters, *_, side = case.shapes.get("weight", (case.shapes["x"][1], 1))
        return side**2 * (filters // case.shapes["x"][1]), math.prod(case.shapes["x"])

    rows = [case for case in testing.CASES if case.shapes["x"][0] == 2]
    return [on(min((case for case in rows if case.op == op), key=steps), device) for op in TARGETS]


def batched(case: testing.Case, device: str) -> DeviceCase:
    """The row at BATCH, but for the filters, which no sample has of its own."""
    shapes = {n: s if n in ("weight", "bias") else (BATCH, *s[1:]) for n, s in case.shapes.items()}
    name = case.name.replace("1x", f"{BATCH}x", 1)
    return DeviceCase(**fields(replace(case, shapes=shapes, name=name)), device=device)


def on(case: testing.Case, device: str) -> DeviceCase:
    return DeviceCase(**{**fields(case), "device": device})


def fields(case: testing.Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in testing.Case.__dataclass_fields__}


def in_turns(cases: list[DeviceCase]) -> list[DeviceCase]:
    """One of each operator, then the next of each: none of them is all at the end."""
    of = {op: [case for case in cases if case.op == op] for op in TARGETS}
    return sorted(cases, key=lambda case: of[case.op].index(case))


def first(cases: Iterator[testing.Case]) -> Any:
    return next(cases)
