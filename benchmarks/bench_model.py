"""Whole networks: inference at batch 1 and 8 of 224 x 224, a training step of 16 images of 128 x 128.

The same contenders, checks and bounds as `mobileformer bench`, all seven variants. A training step is forward, cross
entropy, backward and AdamW. 52m also has that of its recipe for Fashion-MNIST: 128 grey images of 64 x 64, 10 classes.
torch.compile is for 294m and with --with-compile only.
"""

from __future__ import annotations

import functools
import math

import harness
import pytest
import torch
from harness import Row
from pytest_benchmark.fixture import BenchmarkFixture

import mobileformer
from mobileformer.race.published import MADDS
from mobileformer.race.trial import EAGER, Contender, Trial

DTYPE = torch.float32
COMPILED = "294m"
# (what, batch, side of an image) -> rounds of COMPILED and of the others
TASKS = {
    ("inference", 1, 224): (20, 15),
    ("inference", 8, 224): (10, 6),
    ("training", 16, 128): (6, 4),
    ("training", 128, 64): (6, 6),
}
RECIPE_SIDE, RECIPE_VARIANT = 64, "52m"
# contender's name -> backend, layout
NAMES = {
    "eager": (harness.EAGER, "contiguous"),
    "eager channels_last": (harness.EAGER, "channels_last"),
    "compile": ("compile", "contiguous"),
    "fused": ("fused", "its own"),
    "fused inference": ("to_inference", "its own"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    rows = []
    for device in harness.devices(options.device):
        for what, batch, side in TASKS:
            for variant in [RECIPE_VARIANT] if side == RECIPE_SIDE else mobileformer.VARIANTS:
                for name in contenders(variant, what, options.with_compile):
                    label = f"{variant}-{what}-batch{batch}-{side}-{device}-{name.replace(' ', '_')}"
                    rows.append(pytest.param(variant, what, batch, side, device, name, id=label))
    metafunc.parametrize(("variant", "what", "batch", "side", "device", "name"), rows)


def contenders(variant: str, what: str, with_compile: bool) -> list[str]:
    compiled = ["compile"] if with_compile and variant == COMPILED else []
    return [*EAGER, *compiled, "fused", *(["fused inference"] if what == "inference" else [])]


def test_network(
    benchmark: BenchmarkFixture,
    recorder: harness.Recorder,
    pytestconfig: pytest.Config,
    variant: str,
    what: str,
    batch: int,
    side: int,
    device: str,
    name: str,
) -> None:
    rows = measured(variant, what, batch, side, device, pytestconfig.option.with_compile)
    recorder.record(benchmark, rows[name], list(rows.values()))


@functools.lru_cache(maxsize=1)  # the rows of one group follow each other
def measured(variant: str, what: str, batch: int, side: int, device: str, with_compile: bool) -> dict[str, Row]:
    """All contenders of one group, checked, and those that are right timed in turns."""
    torch.compiler.reset()
    channels, classes = (1, 10) if side == RECIPE_SIDE else (3, 1000)
    x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))
    trial = Trial(variant, x, dtype=DTYPE, device=device, train=what == "training", num_classes=classes)
    trial.add(*contenders(variant, what, with_compile))
    trial.check()
    for contender in trial.contenders:
        _hold_to_kernels(contender, device)
    trial.time(TASKS[what, batch, side][0 if variant == COMPILED else 1])
    rows = {}
    for contender in trial.contenders:
        facts = _facts(contender, variant, what, (batch, channels, side, side), device)
        run = trial.runner(contender)
        rows[contender.name] = Row(facts, run=run, error=contender.error, timing=contender.timing)
    return rows


def _hold_to_kernels(contender: Contender, device: str) -> None:
    """The fused ones are served by kernels alone, the others by none."""
    served = contender.kernels
    is_fused = contender.name.startswith("fused")
    right = served and all(kernel.partition(":")[2].startswith(device) for kernel in served) if is_fused else not served
    if contender.error is None and not right:
        contender.error = f"expected {'kernels only' if is_fused else 'no kernel'} to serve, got {served}"


def _facts(
    contender: Contender, variant: str, what: str, shape: tuple[int, int, int, int], device: str
) -> dict[str, object]:
    """shape: (B, C, H, W) of the images."""
    backend, layout = NAMES[contender.name]
    batch, outputs = shape[0], 1000
    weights = sum(parameter.numel() for parameter in contender.parameters)
    madds = MADDS[variant]["conv+linear+matmul"] * 1e6 * batch
    inference = what == "inference"  # the counts are of one forward pass at 224 x 224
    return {
        "suite": "model",
        "op": "network",
        "case": f"{variant}-{'x'.join(map(str, shape))}",
        "variants": variant,
        "direction": what,
        "batch": batch,
        "device": device,
        "backend": backend,
        "layout": layout,
        "dtype": str(DTYPE).removeprefix("torch."),
        # The least that any program moves: weights, image and logits once. Maps between layers could stay on chip.
        "bytes": (weights + batch * (math.prod(shape[1:]) + outputs)) * DTYPE.itemsize if inference else None,
        "flops": round(2 * madds) if inference else None,
        "kernel": ", ".join(f"{count} {kernel}" for kernel, count in contender.kernels.items()) or None,
        "logits_off_by": contender.difference.relative if contender.difference else None,
        "gradients_off_by": contender.gradient_difference,
    }
