"""Where the time of a call goes on the card: every kernel that it launches, how often, and for how long.

The profiler's own clock on the device, of calls that are warm and not in a graph. Kernels that take the longest are
named; the wall time of a call beside the sum of its kernels says how much of it the host takes.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.graphs import lane
from gpu.models import DRY_TASKS, SIDE, Group, Task, Trial
from gpu.operators import check_alive
from gpu.section import Section

CALLS = 5
NAMED = 25  # kernels of a row, by the time that they take together
LOOKED_AT = (
    (Task("inference", 1), "to_inference"),
    (Task("inference", 256), "to_inference"),
    (Task("training", 128), "fused"),
)


def run(section: Section, device: str, dry: bool) -> None:
    """A row for each call: `kernels`, `device_us`, `wall_us` of one call, and `by_kernel`."""
    looked_at = [(DRY_TASKS[0], "fused"), (DRY_TASKS[1], "fused")] if dry else list(LOOKED_AT)
    section.plan([_label(task, name) for task, name in looked_at])
    with lane(device):
        for task, name in looked_at:
            label, facts = _label(task, name), {"contender": name, "batch": task.batch, "what": task.what}
            if section.done(label):
                continue
            try:
                call = _call(task, name, device, 32 if dry else SIDE, dry)
                section.add(label, facts | _profiled(call, device, 1 if dry else CALLS))
            except Exception as error:  # noqa: BLE001 whatever a kernel raises is its row's
                section.fail(label, facts, f"{type(error).__name__}: {str(error)[:2000]}")
                check_alive(device)


def _label(task: Task, name: str) -> str:
    return f"{name} {task.what} {task.batch}"


def _call(task: Task, name: str, device: str, side: int, dry: bool) -> Callable[[], object]:
    group = Group("26m" if dry else "294m", task, "bfloat16", (name,))
    trial = Trial(group, device, side, with_truth=False)
    network, x, parameters = trial.contender(name)
    if trial.train:
        optimizer = trial.optimizer(parameters)
        return lambda: trial.step(network, x, optimizer)
    return lambda: trial.probe(network, x, parameters)


def _profiled(call: Callable[[], object], device: str, calls: int) -> dict[str, Any]:
    on_card = device != "cpu"
    wait = torch.cuda.synchronize if on_card else lambda: None
    for _ in range(min(3, calls)):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    wall = (time.perf_counter() - start) / calls
    kind = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(calls):
            call()
        wait()
    wanted = torch.autograd.DeviceType.CUDA if on_card else torch.autograd.DeviceType.CPU
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        if event.device_type == wanted and (on_card or not event.cpu_children):  # on the CPU, leaves stand in
            times[event.name] += event.device_time if on_card else event.cpu_time
            counts[event.name] += 1
    if not counts:
        raise RuntimeError("the profiler saw no kernel")
    return {
        "kernels": sum(counts.values()) / calls,
        "device_us": sum(times.values()) / calls,
        "wall_us": 1e6 * wall,
        "by_kernel": [
            {"kernel": name[:120], "count": counts[name] / calls, "us": total / calls}
            for name, total in times.most_common(NAMED)
        ],
    }
