"""What a measurement depends on, as plain data to keep beside it."""

from __future__ import annotations

import os
import platform

import torch

__all__ = ["machine"]


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """What a measurement depends on: processor, instruction set, threads, versions, and the GPU if asked."""
    described: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = str(torch.version.cuda)
    return described


def _cpu_name() -> str:
    """With family and model: virtual machines call processors of several generations by one name."""
    told: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                told.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        pass
    if "model name" not in told:
        return platform.processor() or platform.machine()
    generation = [f"{key} {told[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in told]
    return ", ".join([told["model name"], " ".join(generation)] if generation else [told["model name"]])
