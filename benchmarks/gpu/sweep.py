"""Kernels at other settings than the chosen ones: what the rules of `mf_kernels.triton._settings` leave on the table.

Rows of one kernel take turns and are right or not timed, as in the section of operators. A row has what the compiler
gave each of its kernels: registers, spilled and shared bytes, and how many programs of it one multiprocessor holds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton_launches import launches_of, resources

from gpu import machine, operators
from gpu.graphs import lane, timed
from gpu.operators import DIRECTIONS, TARGETS, DeviceCase, Group
from gpu.section import Section
from mf_kernels import testing
from mf_kernels.triton import _settings

CONTENDER = ("triton", "channels_last")
THREADS, REGISTERS, PROGRAMS = 2048, 65536, 32  # that one multiprocessor of sm_80 and sm_90 holds
SHARED = {8: 164 * 1024, 9: 228 * 1024}  # bytes, by the major number of the capability
VARIATIONS: dict[str, dict[str, float]] = {
    "as chosen": {},
    "warps x2": {"warps": 2},
    "warps /2": {"warps": 0.5},
    "tile x2": {"tile": 2},
    "tile /2": {"tile": 0.5},
    "splits x2": {"programs": 2},
    "splits /2": {"programs": 0.5},
    "stages +1": {"stages": 1},
}


@contextlib.contextmanager
def varied(name: str) -> Iterator[None]:
    """Every launch inside the block at one of VARIATIONS."""
    change = VARIATIONS[name]
    with contextlib.ExitStack() as stack:
        for rule in ("dynamic_relu", "attention", "depthwise"):
            replaced = functools.partial(_changed, rule, getattr(_settings, rule), change)
            stack.enter_context(mock.patch.object(_settings, rule, replaced))
        if "programs" in change:
            places = _settings.multiprocessors
            wanted = lambda capability: max(1, round(places(capability) * change["programs"]))  # noqa: E731
            stack.enter_context(mock.patch.object(_settings, "multiprocessors", wanted))
        yield


def _changed(rule: str, chosen: Callable[..., Any], change: dict[str, float], *arguments: Any, **options: Any) -> Any:
    if rule == "depthwise" and "tile" in change:
        options["elements"] = int(options.get("elements", 2048) * change["tile"])
    settings = chosen(*arguments, **options)
    if rule != "depthwise" and "tile" in change:
        settings = _retiled(settings, arguments[1 if rule == "attention" else 2], change["tile"])
    if "warps" in change:
        settings = settings._replace(num_warps=min(16, max(1, int(settings.num_warps * change["warps"]))))
    if "stages" in change and "num_stages" in settings._fields:
        settings = settings._replace(num_stages=settings.num_stages + int(change["stages"]))
    return settings


def _retiled(settings: Any, length: int, factor: float) -> Any:
    """Tiles of another length, that cover the axis of `length` positions in about as many splits."""
    block = max(16, int(settings.block_l * factor))
    tiles = _settings.ceil_div(length, block)
    each = _settings.ceil_div(tiles, min(settings.splits, tiles))
    return settings._replace(block_l=block, tiles=each, splits=_settings.ceil_div(tiles, each))


def cases(device: str, dry: bool) -> list[DeviceCase]:
    """One row of each operator: the widest map of 294m."""
    if dry:
        return operators.dry_cases(device)[0:3:2]  # an attention and another rule
    rows = [case for case in testing.TIMED if operators.FIRST in case.layer_of and case.shapes["x"][2] == 56]
    return [operators.batched(next(case for case in rows if case.op == op), device) for op in TARGETS]


def run(section: Section, device: str, dry: bool) -> None:
    section.header |= {"variations": VARIATIONS, "copy_gb_per_s": machine.copy_ceiling(section)}
    names = list(VARIATIONS)[:4] if dry else list(VARIATIONS)
    groups = [
        Group(operators.on(case, device), direction, "bfloat16", (CONTENDER,))
        for case in cases(device, dry)
        for direction in DIRECTIONS
    ]
    section.plan([_label(group, name) for group in groups for name in names])
    with lane(device):
        for group in groups:
            _measure(group, names, section, device)
            testing.expectation.cache_clear()
            gc.collect()


def _label(group: Group, name: str) -> str:
    return f"{group.case.id} {group.direction}: {name}"


def _measure(group: Group, names: list[str], section: Section, device: str) -> None:
    rows, runs, sets = {}, {}, {}
    for name in names:
        label = _label(group, name)
        if section.done(label):
            continue
        facts = operators.describe(group, CONTENDER, device) | {"variation": name}
        try:
            with varied(name):
                facts["launches"] = _compiled(group, device)
                runs[label], sets[label] = operators.build(group, CONTENDER, device, facts)
            rows[label] = facts
        except Exception as error:  # noqa: BLE001 a setting that does not compile, spills over or is wrong is its row's
            section.fail(label, facts, f"{type(error).__name__}: {str(error)[:1000]}")
            operators.check_alive(device)
    timings = timed(runs, sets, device, repeats=8, sample_ms=2.0) if runs else {}
    for label, timing in timings.items():
        rate = rows[label]["bytes"] / timing.median_ms / 1e6
        ceiling = section.header["copy_gb_per_s"]
        times = {"median_ms": timing.median_ms, "min_ms": timing.min_ms, "gb_per_s": rate}
        section.add(label, rows[label] | times | {"share_of_copy": rate / ceiling if ceiling else None})


def _compiled(group: Group, device: str) -> list[dict[str, Any]] | None:
    """What each kernel of the pass takes of a multiprocessor, at the settings of this moment; None on the CPU."""
    if device == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability()
    arch, batch = 10 * major + minor, group.case.shapes["x"][0]
    found = []
    for call in launches_of(group.case, torch.bfloat16, channels_last=True, batch=batch, arch=arch):
        if (group.direction == "backward") != ("backward" in call.kernel.__name__):
            continue
        needs = resources(call, arch)
        threads = 32 * call.num_warps
        resident = min(THREADS // threads, PROGRAMS, REGISTERS // (threads * max(8, -(-needs["registers"] // 8) * 8)))
        if needs["shared_bytes"]:
            resident = min(resident, SHARED.get(major, SHARED[9]) // (needs["shared_bytes"] + 1024))
        kept = {key: needs[key] for key in ("registers", "spilled_bytes", "shared_bytes")}
        found.append({"kernel": call.kernel.__name__, "programs": call.programs, **kept, "resident": resident})
    return found
