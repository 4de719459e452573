"""Whole networks at 224 x 224: plain PyTorch in both layouts, in a CUDA graph, compiled; ours the same ways; timm's.

A group is one network, task and dtype; its contenders take turns. Each is compared with the same weights in float64
first: plain PyTorch is held to a fixed bound, the others to twice its error. bfloat16 is autocast with weights in
float32, which casts every weight at every call, but for `to_inference` and the rows named "cast", whose weights are
bfloat16. A training step is forward, cross entropy, backward, AdamW.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mf_kernels
import mobileformer
from gpu.graphs import Replay, lane, timed
from gpu.operators import DTYPES, check_alive
from gpu.section import Section
from mobileformer.measure.difference import (
    GRADIENT_BOUNDS,
    LOGIT_BOUNDS,
    difference,
    lively_weights_,
    relative_norm,
    why_wrong,
)
from mobileformer.race.published import MADDS

VARIANTS = ("294m", "508m", "26m")
PEERS = ("levit_128", "hgnetv2_b1")  # what is fastest on a card at about this accuracy
MORE_PEERS = ("mobilenetv4_conv_medium", "repvit_m0_9", "mobilenetv3_large_100")
SIDE = 224


class Task(NamedTuple):
    what: str  # "inference" or "training"
    batch: int


TASKS = (Task("inference", 1), Task("inference", 256), Task("inference", 32), Task("training", 128))
DRY_TASKS = (Task("inference", 2), Task("training", 8))

# name -> backend and layout of the row
CONTENDERS = {
    "eager": ("eager", "contiguous"),
    "eager channels_last": ("eager", "channels_last"),
    "eager graph": ("eager graph", "channels_last"),
    "eager cast graph": ("eager cast graph", "channels_last"),
    "fused": ("fused", "its own"),
    "fused graph": ("fused graph", "its own"),
    "fused cast graph": ("fused cast graph", "its own"),
    "to_inference": ("to_inference", "its own"),
    "to_inference graph": ("to_inference graph", "its own"),
    "compile": ("compile", "contiguous"),
    "compile graphs": ("compile graphs", "contiguous"),  # mode "reduce-overhead"
    "compile max-autotune": ("compile max-autotune", "contiguous"),  # with CUDA graphs of its own
    "fused compile": ("fused compile", "its own"),
}
PLAIN = tuple(name for name in CONTENDERS if not name.startswith("compile") and name != "fused compile")
WITH_GRAPHS = ("eager channels_last", "fused graph", "compile graphs")
COMPILED = ("eager channels_last", "fused graph", "compile", "fused compile", "compile max-autotune")
DRY_COMPILED = ("eager channels_last", "fused compile")
LEAST = {"float32": (3e-5, 2e-2), "bfloat16": (5e-2, 0.2)}  # what anyone may be off: logits, gradient


class Group(NamedTuple):
    network: str
    task: Task
    dtype: str
    contenders: tuple[str, ...]

    def label(self, contender: str) -> str:
        kind = "compiled " if self.contenders in (COMPILED, DRY_COMPILED, WITH_GRAPHS) else ""
        return f"{kind}{self.network} {self.task.what} {self.task.batch} {self.dtype}: {contender}"


def groups(dry: bool, more: bool) -> list[Group]:
    """In the order of importance: what a budget cuts off is the end. `more` are those behind everything else."""
    if dry:
        names = tuple(name for name in PLAIN if not name.startswith("to_inference"))  # another program on the CPU
        dtype = "float32" if more else "bfloat16"
        plain = [Group("26m", task, dtype, _of(task, dtype, names)) for task in DRY_TASKS[: 1 if more else None]]
        # On the CPU the modes of the compiler are one
        return [*plain, Group("26m", DRY_TASKS[0], dtype, DRY_COMPILED if more else WITH_GRAPHS)]
    first, *others = VARIANTS
    beside = ("eager channels_last", "eager graph", "eager cast graph")
    if not more:
        return [
            *(Group(first, task, "bfloat16", _of(task, "bfloat16", PLAIN)) for task in TASKS),
            *(Group(peer, task, "bfloat16", _of(task, "bfloat16", beside)) for peer in PEERS for task in TASKS),
            *(Group(first, task, "bfloat16", WITH_GRAPHS) for task in TASKS),
        ]
    return [
        *(Group(first, task, "float32", _of(task, "float32", PLAIN)) for task in TASKS),
        *(Group(v, task, dtype, _of(task, dtype, PLAIN)) for dtype in DTYPES for v in others for task in TASKS),
        *(Group(peer, task, "bfloat16", _of(task, "bfloat16", beside)) for peer in MORE_PEERS for task in TASKS),
        *(Group(first, task, dtype, COMPILED) for dtype in DTYPES for task in TASKS),
    ]


def _of(task: Task, dtype: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that there are of a task: training has float32 weights, and in float32 nothing is cast."""
    return tuple(
        name
        for name in names
        if (task.what == "inference" or not name.startswith("to_inference"))
        and ("cast" not in name or (task.what == "inference" and dtype != "float32"))
    )


def run(section: Section, device: str, dry: bool) -> None:
    section.header |= {"side": 32 if dry else SIDE, "peers": [*PEERS, *MORE_PEERS]}
    planned = groups(dry, more=section.header["section"].startswith("more"))
    section.plan([group.label(contender) for group in planned for contender in group.contenders])
    with lane(device):
        for group in planned:
            if group.network in section.header["peers"] and find_spec("timm") is None:
                for contender in group.contenders:
                    section.skip(group.label(contender), "timm is not installed")
                continue
            measure(group, section, device, section.header["side"])
            gc.collect()


def measure(group: Group, section: Section, device: str, side: int) -> None:
    """Build and check every contender that is not done, time those that are right in turns."""
    waiting = [name for name in group.contenders if not section.done(group.label(name))]
    if not waiting:
        return
    torch.compiler.reset()
    trial = Trial(group, device, side)
    rows, runs = {}, {}
    for name in waiting:
        label = group.label(name)
        facts = describe(group, name, device, side)
        try:
            runs[label] = trial.runner(name, facts)
            rows[label] = facts
        except Exception as error:  # noqa: BLE001 whatever a kernel, a compiler or a capture raises is its row's
            section.fail(label, facts, f"{type(error).__name__}: {str(error)[:2000]}")
            check_alive(device)
    repeats = 6 if group.task.what == "training" else 10
    timings = timed(runs, dict.fromkeys(runs, 1), device, repeats=repeats, sample_ms=5.0) if runs else {}
    plain = [t.median_ms for label, t in timings.items() if rows[label]["backend"] == "eager"]
    for label, timing in timings.items():
        section.add(
            label,
            rows[label]
            | {"median_ms": timing.median_ms, "min_ms": timing.min_ms, "calls": timing.calls}
            | {"images_per_s": 1e3 * group.task.batch / timing.median_ms}
            | {"against_eager": min(plain) / timing.median_ms if plain else None},
        )


def describe(group: Group, name: str, device: str, side: int) -> dict[str, Any]:
    madds = MADDS[group.network]["conv+linear+matmul"] * 1e6 if group.network in MADDS and side == SIDE else None
    backend, layout = CONTENDERS[name]
    return {
        "suite": "model",
        "op": "network",
        "case": f"{group.network}-{group.task.batch}x3x{side}x{side}",
        "variants": group.network,
        "direction": group.task.what,
        "batch": group.task.batch,
        "device": device,
        "backend": backend,
        "layout": layout,
        "dtype": group.dtype,
        "flops": round(2 * madds * group.task.batch) if madds and group.task.what == "inference" else None,
    }


class Trial:
    """One group's weights and images, its float64 logits and gradient, and the contenders made from them."""

    def __init__(self, group: Group, device: str, side: int, *, with_truth: bool = True) -> None:
        self.group, self.device = group, device
        self.train = group.task.what == "training"
        torch.manual_seed(0)
        self.x = torch.randn(group.task.batch, 3, side, side, device=device)
        self.target = torch.arange(group.task.batch, device=device) * 97 % 1000
        self.plain, self.fused = networks(group.network)
        self.truth: list[Tensor] = []
        if with_truth:
            exact = copy.deepcopy(self.plain).to(device).double().train(self.train)
            self.truth = self.probe(exact, self.x.double(), list(exact.parameters()))
        self.made: tuple[float, float] | None = None  # plain PyTorch's errors

    def autocast(self) -> Any:
        if self.group.dtype == "float32":
            return nullcontext()
        # a graph must not keep weights that were cast before it
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def probe(self, network: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Logits, and in training the gradients of all parameters."""
        autocast = self.autocast() if x.dtype == torch.float32 else nullcontext()
        if not self.train:
            with torch.no_grad(), autocast:
                return [network(x)]
        with autocast:
            logits = network(x)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), self.target)
        return [logits.detach(), *torch.autograd.grad(loss, parameters)]

    def runner(self, name: str, facts: dict[str, Any]) -> Callable[[], object]:
        """What is timed, once what it computes is right; raises what is wrong with it."""
        network, x, parameters = self.contender(name)
        probe = functools.partial(self.probe, network, x, parameters)
        graph = name.endswith("graph")
        with mf_kernels.record_kernels() as record:
            found = Replay([probe], self.device).outputs()[0] if graph else probe()
        facts["kernels"] = dict(sorted(record.counts.items()))
        self.check_served(name, record.counts)
        facts["logits_off_by"], facts["gradient_off_by"] = self.check(found, name)
        del found
        run = functools.partial(self.step, network, x, self.optimizer(parameters)) if self.train else probe
        return Replay([run], self.device) if graph else run

    def contender(self, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor, list[nn.Parameter]]:
        source = self.fused if name.startswith(("fused", "to_inference")) else self.plain
        model = copy.deepcopy(source).to(self.device).train(self.train)
        x, network = self.x, model
        if "cast" in name:
            model, x = model.to(DTYPES[self.group.dtype]), x.to(DTYPES[self.group.dtype])
            network = model
        if name in ("eager channels_last", "eager graph", "eager cast graph"):
            network = model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        elif name.startswith("to_inference"):
            network = model.to_inference(dtype=DTYPES[self.group.dtype])
            x = x.to(DTYPES[self.group.dtype])
        elif "compile" in name:
            modes = {"compile max-autotune": "max-autotune", "compile graphs": "reduce-overhead"}
            options = {"mode": modes[name]} if name in modes else {}
            network = torch.compile(model, **({"backend": "aot_eager"} if self.device == "cpu" else options))
        return network, x, list(model.parameters())

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """At rate 0 it does all its work and the next step is the same work again."""
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, capturable=self.device != "cpu")

    def step(self, network: Callable[[Tensor], Tensor], x: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with self.autocast():
            logits = network(x)
        F.cross_entropy(logits.float(), self.target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def check_served(self, name: str, counts: dict[str, int]) -> None:
        """Ours by kernels of this device alone, the others by none."""
        fused = name.startswith(("fused", "to_inference"))
        right = counts and all(f":{self.device}" in kernel for kernel in counts) if fused else not counts
        if not right:
            raise AssertionError(f"expected {'kernels only' if fused else 'no kernel'} to serve, got {counts}")

    def check(self, found: list[Tensor], name: str) -> tuple[float, float | None]:
        """Errors of logits and gradient; raises AssertionError where they are too large."""
        logits = difference(found[0], self.truth[0]).relative
        gradient = 0.0
        if self.train:
            gradient = relative_norm(found[1:], self.truth[1:])
        dtype = DTYPES[self.group.dtype]
        most = LOGIT_BOUNDS["card"][dtype], GRADIENT_BOUNDS["card"][dtype]
        if self.made is None and name.startswith("eager"):
            self.made = logits, gradient
        else:
            made = self.made or most
            most = tuple(2 * m + least for m, least in zip(made, LEAST[self.group.dtype], strict=True))
        wrong = why_wrong("logits", logits, most[0]) or why_wrong("gradients", gradient, most[1], of="their norm")
        if wrong is not None:
            raise AssertionError(wrong)
        return logits, gradient if self.train else None


def networks(name: str) -> tuple[nn.Module, nn.Module | None]:
    """(plain, fused) with the same weights; of timm's networks there is the plain one alone."""
    if name in (*PEERS, *MORE_PEERS):
        import timm

        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False), None
    plain = mobileformer.Model(name, use_fused=False)
    lively_weights_(plain)
    fused = mobileformer.Model(name, use_fused=True)
    fused.load_state_dict(plain.state_dict())
    return plain, fused
