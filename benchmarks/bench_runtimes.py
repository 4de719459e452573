"""The race: the engine against ONNX Runtime, OpenVINO and eager PyTorch, and against other networks in those runtimes.

All contenders of a race (threads, batch) take turns in one run, so any two of its times may be divided by each other.
Every one is checked first: Mobile-Former against the model in float64, another network in one runtime against it in
the other. What is not installed is left out and said; torch.compile is in the rows of bench_model.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import peers
import pytest
import torch
from harness import Row
from pytest_benchmark.fixture import BenchmarkFixture

import mobileformer
from mobileformer.export import export_model
from mobileformer.inference import Engine, FoldedNetwork, fold, library
from mobileformer.measure.difference import LOGIT_BOUNDS, difference, lively_weights_, why_wrong
from mobileformer.measure.timing import interleaved
from mobileformer.race import runtimes
from mobileformer.race.published import MADDS

RACES = ((1, 1), (1, 8), (2, 1))  # threads, batch
CONTENDERS = (("engine", "float32"), ("engine", "bfloat16"), ("onnxruntime", "float32"))
CONTENDERS += (("openvino", "float32"), ("openvino", "bfloat16"), (harness.EAGER, "float32"))
PEERS = tuple(peers.PEERS) if all(importlib.util.find_spec(name) for name in ("timm", "torchvision")) else ()


def _missing() -> str:
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime", "openvino") if not importlib.util.find_spec(name)]
    reason = library.status()["reason"]
    return f"the extra export is not installed: no {', '.join(absent)}" if absent else reason or ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


def _rows() -> list[pytest.param]:
    rows = []
    for threads, batch in RACES:
        for variant in mobileformer.VARIANTS:
            for backend, dtype in CONTENDERS:
                if backend != harness.EAGER or threads == 1:
                    rows.append((threads, batch, variant, backend, dtype))
        if batch == 1 and threads == 1:
            for peer in PEERS:
                rows += [(threads, batch, peer, backend, "float32") for backend in ("onnxruntime", "openvino")]
    return [pytest.param(*row, id="-".join(map(str, row)).replace(" ", "_")) for row in rows]


@pytest.mark.parametrize(("threads", "batch", "network", "backend", "dtype"), _rows())
def test_race(
    benchmark: BenchmarkFixture,
    recorder: harness.Recorder,
    threads: int,
    batch: int,
    network: str,
    backend: str,
    dtype: str,
) -> None:
    rows = race(threads, batch)
    key = (network, backend, dtype)
    if key not in rows:
        pytest.skip(f"{backend} has no {dtype} on this processor")
    group = [row for (name, _, _), row in rows.items() if name == network]
    recorder.record(benchmark, rows[key], group)


@functools.lru_cache(maxsize=1)  # the rows of one race follow each other
def race(threads: int, batch: int) -> dict[tuple[str, str, str], Row]:
    """All contenders, checked, and those that are right timed in turns."""
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows: dict[tuple[str, str, str], Row] = {}
    for variant in mobileformer.VARIANTS:
        rows |= _mobileformer(variant, x, threads)
    if batch == 1 and threads == 1:
        for name in PEERS:
            rows |= _peer(name, x, threads)
    runs = {key: row.run for key, row in rows.items() if row.error is None}
    for key, timing in interleaved(runs, repeats=12, warmup=3, min_sample_ms=25.0).items():
        rows[key].timing = timing
    return rows


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mobileformer-race-")


@functools.cache
def _made(variant: str) -> tuple[mobileformer.Model, FoldedNetwork, Path]:
    model = mobileformer.Model(variant, use_fused=False).eval()
    lively_weights_(model)
    path = Path(_folder().name) / f"{variant}.onnx"
    export_model(model, path, "onnx", check=False)
    return model, fold(model), path


def _mobileformer(variant: str, x: torch.Tensor, threads: int) -> dict[tuple[str, str, str], Row]:
    model, folded, path = _made(variant)
    images = x.numpy()
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double())
    rows = {}
    for backend, dtype in CONTENDERS:
        if backend == harness.EAGER and threads > 1:
            continue
        try:
            run = _contender(backend, dtype, model, folded, path, x, images, threads)
        except RuntimeError as error:
            if "bf16" not in str(error):
                raise
            continue
        madds = MADDS[variant]["conv+linear+matmul"]
        rows[variant, backend, dtype] = _row(variant, backend, dtype, x, threads, run, truth, madds)
    return rows


def _contender(
    backend: str,
    dtype: str,
    model: mobileformer.Model,
    folded: FoldedNetwork,
    path: Path,
    x: torch.Tensor,
    images: np.ndarray,
    threads: int,
) -> Callable[[], np.ndarray]:
    if backend == "engine":
        engine = Engine(folded, dtype, threads)
        return lambda: engine(images)
    if backend == "onnxruntime":
        session = runtimes.onnxruntime_session(path, tuple(images.shape), threads=threads)
        return lambda: session(images)
    if backend == "openvino":
        precision = "f32" if dtype == "float32" else "bf16"
        compiled = runtimes.openvino_model(path, tuple(images.shape), threads=threads, precision=precision)
        return lambda: compiled(images)

    def eager() -> np.ndarray:  # channels_last: the faster layout for one image, bench_model has both
        with torch.inference_mode():
            return model(x.contiguous(memory_format=torch.channels_last)).numpy()

    return eager


def _peer(name: str, x: torch.Tensor, threads: int) -> dict[tuple[str, str, str], Row]:
    path = peers.write_onnx(peers.PEERS[name], Path(_folder().name))
    images = x.numpy()
    session = runtimes.onnxruntime_session(path, tuple(images.shape), threads=threads)
    compiled = runtimes.openvino_model(path, tuple(images.shape), threads=threads)
    runs = {"onnxruntime": lambda: session(images), "openvino": lambda: compiled(images)}
    truth = torch.from_numpy(session(images)).double()
    return {
        (name, backend, "float32"): _row(name, backend, "float32", x, threads, run, truth, None)
        for backend, run in runs.items()
    }


def _row(
    network: str,
    backend: str,
    dtype: str,
    x: torch.Tensor,
    threads: int,
    run: Callable[[], np.ndarray],
    truth: torch.Tensor,
    madds: float | None,
) -> Row:
    off = difference(torch.from_numpy(np.array(run())), truth).relative
    batch, _, height, width = x.shape
    facts = {
        "suite": "race",
        "op": "race",
        "case": f"{network}-{batch}x3x{height}x{width}-{threads}threads",
        "variants": network,
        "direction": "inference",
        "batch": batch,
        "threads": threads,
        "device": "cpu",
        "backend": backend,
        "layout": dtype,
        "dtype": dtype,
        "bytes": None,
        "flops": round(2e6 * madds * batch) if madds else None,
        "kernel": library.status()["runnable"][-1] if backend == "engine" else None,
        "top1": peers.PEERS[network].top1 if network in peers.PEERS else mobileformer.VARIANTS[network].published_top1,
        "logits_off_by": off,
    }
    error = why_wrong("logits", off, LOGIT_BOUNDS["runtime"][getattr(torch, dtype)])
    return Row(facts, run=run, error=error)
