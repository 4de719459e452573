"""The Triton kernels without a GPU: run in the interpreter, settings for every shape of the model, and the door."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_support import OPS, TRITON_OPS, python

import mf_kernels
from mf_kernels import _preference, _registry, _triton
from mf_kernels.testing import TIMED

ROOT = Path(mf_kernels.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    _triton.missing("dynamic_relu", "cpu") == "triton is not installed", reason="triton is not installed"
)
CAPABILITIES = ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))


def test_every_kernel_in_the_interpreter() -> None:
    """The properties of all kernels, in a process that had TRITON_INTERPRET=1 before its first import."""
    files = (f"tests/{name}.py" for name in ("test_operators", "test_operator_values", "triton_interpreted"))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= 240


def test_importing_the_package_does_not_import_triton() -> None:
    ran = python("import sys, mf_kernels; print('triton' in sys.modules, 'mf_kernels.triton' in sys.modules)")
    assert ran.stdout.split() == ["False", "False"], ran.stderr


def _settings(B: int, capability: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Settings of every layer of the model with another batch, in both layouts and two dtypes."""
    from mf_kernels.triton import _settings

    found = []
    for case in TIMED:
        _, C, H, W = case.shapes["x"]
        for channels_last in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                if case.op == "dynamic_relu":
                    s = _settings.dynamic_relu(B, C, H * W, dtype, channels_last, capability)
                    assert s.splits * s.tiles * s.block_l >= H * W > (s.splits - 1) * s.tiles * s.block_l
                elif case.op == "depthwise_conv2d":
                    outputs, (OH, OW) = case.shapes["weight"][0], case.output_shape[2:]
                    s = _settings.depthwise(B, outputs, OH, OW, channels_last, dtype == torch.float32, capability)
                    assert s.tiles == B * -(-OH // s.block_h) * -(-OW // s.block_w)
                else:
                    N = case.options["num_heads"]
                    s = _settings.attention(
                        B, H * W, C // N, N, dtype, capability, backward=channels_last
                    )  # the layout plays no part in these
                    assert s.splits * s.tiles * s.block_l >= H * W > (s.splits - 1) * s.tiles * s.block_l
                    assert s.chunks * s.block_e >= C // N
                    assert s.tokens >= 8
                found.append((case.op, s))
    return found


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 32, 128, 1024])
def test_settings_cover_every_layer_of_the_model(batch: int, capability: tuple[int, int]) -> None:
    """Powers of two, tiles that registers hold, splits that cover the positions and leave none empty."""
    settings = _settings(batch, capability)
    assert settings == _settings(batch, capability), "the same call, the same settings"
    for op, s in settings:
        blocks = [value for name, value in s._asdict().items() if name.startswith("block") or name == "num_warps"]
        assert all(value & (value - 1) == 0 and value > 0 for value in blocks), (op, s)
        tile = s.block_l * s.block_e if hasattr(s, "block_e") else s.block_c * (
            s.block_l if hasattr(s, "block_l") else s.block_h * s.block_w
        )  # fmt: skip
        assert tile <= 4096, (op, s)
        assert tile >= 32 * s.num_warps or s.num_warps == 1, (op, s)


def test_batch_1_fills_the_card_where_there_is_enough_to_do() -> None:
    from mf_kernels.triton import _settings

    for C, side in ((16, 112), (24, 56)):
        s = _settings.attention(1, side**2, C // 2, 2, torch.bfloat16, (9, 0), backward=False)
        assert 2 * s.splits >= 132
    s = _settings.dynamic_relu(1, 96, 56 * 56, torch.bfloat16, True, (9, 0))
    assert s.splits * -(-96 // s.block_c) >= 132


def test_the_choice_of_auto_is_a_table_with_its_justification() -> None:
    assert set(_preference.CUDA) <= set(OPS)
    for preference in _preference.CUDA.values():
        assert sorted(preference.backends) == ["native", "triton"]
        if preference.justified_by is None:
            assert preference.backends[0] == "triton"
        else:
            assert (ROOT / preference.justified_by).is_file()


@pytest.fixture
def unresolved() -> None:
    """No answer kept from before, and none left behind."""
    caches = (_registry._resolve, _registry.why_not, _triton.missing, _triton.does_not_compile)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pretend_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.usefixtures("unresolved")
def test_an_old_card_is_refused_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_card(monkeypatch, (7, 5))
    reason = _registry.why_not("dynamic_relu", "triton", "cuda", torch.float32)
    assert reason == "compute capability 7.5, the Triton kernels need 8.0 or higher"


@pytest.mark.usefixtures("unresolved")
def test_a_triton_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: str) -> None:
        raise OSError("libtriton.so: wrong ELF class")

    pretend_card(monkeypatch, (9, 0))
    monkeypatch.setattr(_triton, "_module", broken)
    reason = _registry.why_not("dynamic_relu", "triton", "cuda", torch.float32)
    assert reason == "triton does not import: OSError: libtriton.so: wrong ELF class"


@pytest.mark.usefixtures("unresolved", "unwarned")
def test_a_kernel_that_does_not_compile_falls_back_once_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by auto: one warning with the reason. Asked for by name: an error with the reason."""

    def broken(op: str, dtype: torch.dtype) -> None:
        raise RuntimeError("failed to find a C compiler")

    pretend_card(monkeypatch, (9, 0))
    monkeypatch.setattr(_triton, "_compile_tiny", broken)
    told = "triton does not compile this operator here: RuntimeError: failed to find a C compiler"
    with pytest.warns(mf_kernels.KernelFallbackWarning, match=told):
        assert _registry.route("dynamic_relu", "cuda", torch.float32) == "reference"
    assert _registry.route("dynamic_relu", "cuda", torch.float32) == "reference"
    with mf_kernels.use_backend("triton"), pytest.raises(RuntimeError, match=told):
        _registry.route("dynamic_relu", "cuda", torch.float32)


@pytest.mark.usefixtures("unresolved")
@pytest.mark.parametrize("op", TRITON_OPS)
def test_on_a_card_auto_takes_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny compilation is real, but for the card that it is for."""
    compiled = []
    pretend_card(monkeypatch, (9, 0))
    monkeypatch.setattr("triton.runtime.jit.JITFunction.warmup", lambda *a, **k: compiled.append(k["num_warps"]))
    assert _registry.route(op, "cuda", torch.bfloat16) == "triton"
    assert len(compiled) >= 2, "forward and backward"
