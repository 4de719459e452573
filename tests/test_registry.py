"""Who serves a call: asked for or chosen, for one thread, with a reason; and how to see it."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
from kernel_support import OPS, native, runnable
from operator_rows import SMALL

import mf_kernels
from mf_kernels import KernelFallbackWarning, _native, _registry, record_kernels, reference, testing, use_backend


def call(op: str, dtype: torch.dtype = torch.float32, **replaced: object) -> torch.Tensor:
    case = SMALL[op]
    return getattr(mf_kernels, op)(**case.inputs(dtype) | case.options | replaced)


def serves() -> str:
    """Which backend a call of this thread gets, seen from its place in the graph of gradients."""
    x, theta = SMALL["dynamic_relu"].inputs(torch.float32).values()
    node = mf_kernels.dynamic_relu(x.requires_grad_(), theta).grad_fn
    return "native" if "DynamicReLU" in type(node).__name__ else "reference"


def test_nested_choices_are_undone() -> None:
    assert serves() == "native"
    with use_backend("reference"):
        assert serves() == "reference"
        with use_backend("native"):
            assert serves() == "native"
            with use_backend("auto"):
                assert serves() == "native"
        assert serves() == "reference"
    assert serves() == "native"


def test_a_choice_is_undone_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert serves() == "native"


def test_an_unknown_backend_is_refused_and_changes_nothing() -> None:
    refused = pytest.raises(ValueError, match=r"backend: expected one of .*'native'.*, got 'cuda'")
    with refused, use_backend("cuda"):
        pass
    assert serves() == "native"


def test_a_choice_is_for_its_own_thread() -> None:
    """Two threads, both inside their blocks at the same time; and a third one that chose nothing."""
    barrier = threading.Barrier(3, timeout=20)
    seen = {}

    def choose(backend: str | None) -> None:
        if backend is None:
            barrier.wait()
            seen[backend] = serves()
            barrier.wait()
            return
        with use_backend(backend):
            barrier.wait()
            seen[backend] = serves()
            barrier.wait()

    with use_backend("reference"):
        threads = [threading.Thread(target=choose, args=(b,)) for b in ("reference", "native", None)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert serves() == "reference"
    assert seen == {"reference": "reference", "native": "native", None: "native"}


@pytest.mark.parametrize(
    ("backend", "replaced", "reason"),
    [
        ("triton", {}, "triton: CPU tensors need Triton's interpreter|triton: triton is not installed"),
        ("native", {"dtype": torch.float16}, "native: no kernel for torch.float16, only float32, "),
        ("native", {"q": torch.zeros(2, 9, 14)}, "native: more than 8 tokens"),
    ],
    ids=["triton", "float16", "tokens"],
)
def test_an_explicit_backend_that_cannot_serve_says_why(backend: str, replaced: dict, reason: str) -> None:
    asked = f"mobile_to_former: backend '{backend}' was asked for and cannot serve this call: "
    with use_backend(backend), pytest.raises(RuntimeError, match=f"{asked}({reason})"):
        call("mobile_to_former", **replaced)


def test_an_operator_that_a_library_has_no_kernel_of_is_missing_there() -> None:
    """Nothing but its equation and its schema was written yet, or the library is from before it."""
    assert _native.missing("dynamic_relu", "cpu") is None
    assert _native.missing("token_side", "cpu") is None
    assert _native.missing("not_written_yet", "cpu") == "_cpu.so has no kernel of it"
    told = _registry.why_not("token_side", "triton", "cpu", torch.float32)
    assert told in ("no Triton kernels of it", "triton is not installed")


@pytest.mark.parametrize("op", OPS)
def test_auto_falls_back_with_one_warning_an_operator(op: str, unwarned: None) -> None:
    """The warning points at the line that called the operator."""
    inputs = SMALL[op].inputs(torch.float16) | SMALL[op].options
    with record_kernels() as record, pytest.warns(KernelFallbackWarning) as caught:
        getattr(mf_kernels, op)(**inputs)
    getattr(mf_kernels, op)(**inputs)
    (warning,) = caught
    reason = "native: no kernel for torch.float16, only float32, float64, bfloat16"
    assert str(warning.message).startswith(f"{op}: no fused kernel serves this call")
    assert reason in str(warning.message)
    assert "python -m mf_kernels" in str(warning.message)
    assert warning.filename == __file__
    assert record.counts == {f"{op}:reference": 2}


def test_more_than_8_tokens_fall_back(unwarned: None) -> None:
    x, many = torch.randn(2, 14, 3, 5), torch.randn(2, 9, 14)
    with record_kernels() as record:
        with pytest.warns(KernelFallbackWarning, match=r"mobile_to_former.*more than 8 tokens"):
            gathered = mf_kernels.mobile_to_former(x, many)
        with pytest.warns(KernelFallbackWarning, match=r"former_to_mobile.*more than 8 tokens"):
            spread = mf_kernels.former_to_mobile(x, many, many)
    assert record.counts == {"mobile_to_former:reference": 1, "former_to_mobile:reference": 1}
    assert torch.equal(gathered, reference.mobile_to_former(x, many))
    assert torch.equal(spread, reference.former_to_mobile(x, many, many))


@pytest.mark.parametrize("op", OPS)
def test_float16_is_the_reference_with_its_gradients(op: str, unwarned: None) -> None:
    case = SMALL[op]
    inputs, d_output = case.inputs(torch.float16), case.d_output(torch.float16)
    with pytest.warns(KernelFallbackWarning):
        actual = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    expected = testing.evaluate(case.function(reference), inputs, d_output)
    assert all(torch.equal(t, expected[name]) for name, t in actual.items())


def test_autocast_to_float16_falls_back(unwarned: None) -> None:
    with torch.autocast("cpu", torch.float16), pytest.warns(KernelFallbackWarning, match="torch.float16"):
        assert call("dynamic_relu").dtype == torch.float16


def test_the_reference_on_request_is_no_fallback(unwarned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_KERNELS_STRICT", "1")
    with use_backend("reference"), record_kernels() as record:
        for op in OPS:
            call(op, torch.float16)
    assert record.counts == {f"{op}:reference": 1 for op in OPS}


def test_strict_makes_every_fallback_an_error(unwarned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_KERNELS_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"dynamic_relu: .*torch.float16.*MF_KERNELS_STRICT=1"):
            call("dynamic_relu", torch.float16)
    call("dynamic_relu")
    monkeypatch.setenv("MF_KERNELS_STRICT", "0")
    with pytest.warns(KernelFallbackWarning):
        call("dynamic_relu", torch.float16)


def test_tensors_without_memory_take_the_reference(unwarned: None) -> None:
    """The meta device has shapes only: nothing to be fused and nothing to warn of."""
    for op, case in SMALL.items():
        inputs = {name: t.to("meta") for name, t in case.inputs(torch.float32).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert getattr(mf_kernels, op)(**inputs, **case.options).shape == case.output_shape


def test_records_are_live_nested_and_see_all_threads() -> None:
    isa = _native.cpu_report()["isa"]
    with record_kernels() as outer:
        assert outer.counts == {}
        call("dynamic_relu")
        assert outer.counts == native("dynamic_relu_fwd", isa=isa)
        with record_kernels() as inner:
            thread = threading.Thread(target=call, args=("dynamic_relu",))
            thread.start()
            thread.join()
            with use_backend("reference"):
                call("dynamic_relu")
        one = {f"dynamic_relu_fwd:native:cpu:{isa}": 1, "dynamic_relu:reference": 1}
        assert inner.counts == one
    assert outer.counts == one | {f"dynamic_relu_fwd:native:cpu:{isa}": 2}


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(runnable()))}, got 'sse9'"):
        _native.set_cpu_isa("sse9")
    assert _native.cpu_report()["isa"] in runnable()
