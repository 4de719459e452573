"""Every row of every kernel: output and gradients, in every layout and dtype, and nothing but them is touched.

What is called is `operator_backends.BACKENDS`; values that arithmetic treats apart are in `test_operator_values.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import emulator_support
import operator_rows
import pytest
import torch
from kernel_support import OPS
from operator_backends import BACKENDS, EMULATED, FLOAT32, NATIVE, NOT_HERE, SETS, Backend
from operator_rows import SMALL
from torch import Tensor

import mf_kernels
from mf_kernels import _triton, reference, testing

Case = testing.Case
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)

# A row's truth is kept for all that are compared with it, so the backends take turns
GRID = [
    pytest.param(case, dtype, backend, id=f"{case.id}-{str(dtype)[6:]}-{backend.name}")
    for case in operator_rows.unique(operator_rows.LAYERS, *(backend.rows for backend in BACKENDS))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for backend in BACKENDS
    if backend.takes(case, dtype)
]


@pytest.mark.parametrize("name", [*(f"native-{isa}" for isa in SETS), "cuda"])
@pytest.mark.skipif(_triton.interpreting(), reason="another process has these")
def test_kernels_that_cannot_run_here_are_told(name: str) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    assert name in {backend.name for backend in BACKENDS}


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("case", "dtype", "backend"), GRID)
def test_output_and_gradients(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    """Within the budget, whatever the layout; the output's gradient of the CPU's lies in another one than the input."""
    truth, allowed = testing.expectation(case, dtype).truth, backend.allowed(case, dtype)
    layouts = backend.layouts(case, dtype)
    for layout in layouts:
        other = layouts[layouts.index(layout) - 1] if backend in NATIVE else layout
        inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=other)
        results = backend.evaluate(case, inputs, d_output)
        assert results.keys() == truth.keys()
        for name, actual in results.items():
            testing.assert_close(f"{layout}: {name}", actual, truth[name], allowed[name], dtype)
        for name in ("output", "d_x"):
            if results[name].dim() == 4 and is_channels_last(inputs["x"]):
                assert results[name].is_contiguous(memory_format=torch.channels_last), (layout, name)
            else:
                assert backend is EMULATED or results[name].is_contiguous(), (layout, name)


@pytest.mark.skipif(EMULATED not in BACKENDS, reason=NOT_HERE.get("cuda", "this process has Triton's interpreter"))
def test_every_cuda_kernel_has_a_row() -> None:
    """All instances of the committed table, each launched by a row of its dtype."""
    table = json.loads(emulator_support.cuda_resources().TABLE.read_text())
    ran = {
        kernel
        for case in EMULATED.rows
        for dtype in EMULATED.looks
        for layout in EMULATED.layouts(case, dtype)
        for kernel in emulator_support.kernels_of(case, dtype, layout)
    }
    assert ran == {row["kernel"] for row in table["kernels"]}


@every_backend
@pytest.mark.parametrize("case", operator_rows.BRANCHES, ids=lambda case: case.id)
def test_around_a_view_nothing_is_read_or_written(case: Case, backend: Backend) -> None:
    """Around each view lies NaN: it stays as it was, and changes no bit of what the CPU's kernels give."""
    if backend.few and case not in SMALL.values():
        return
    expected = backend.evaluate(case, case.inputs(FLOAT32), case.d_output(FLOAT32))
    for layout in backend.views:
        inputs, d_output = case.inputs(FLOAT32, layout=layout), case.d_output(FLOAT32, layout=layout)
        buffers = [t._base for t in (*inputs.values(), d_output)]
        before = [buffer.clone() for buffer in buffers]
        actual = backend.evaluate(case, inputs, d_output)
        for name, t in expected.items():
            same = torch.equal(actual[name], t) if backend in NATIVE else actual[name].isfinite().all()
            assert same, (layout, name)
        for buffer, clean in zip(buffers, before, strict=True):
            assert torch.equal(buffer.view(torch.int32), clean.view(torch.int32)), layout


@every_backend
@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_as_they_are(op: str, backend: Backend) -> None:
    inputs, d_output = SMALL[op].inputs(FLOAT32), SMALL[op].d_output(FLOAT32)
    before = {name: t.clone() for name, t in (*inputs.items(), ("d_output", d_output))}
    backend.evaluate(SMALL[op], inputs, d_output)
    assert all(torch.equal(t, before[name]) for name, t in (*inputs.items(), ("d_output", d_output)))


@every_backend
@pytest.mark.parametrize("case", [*SMALL.values(), *operator_rows.SPLIT], ids=lambda case: case.id)
def test_the_same_bits_every_time(case: Case, backend: Backend) -> None:
    """From any number of threads, too."""
    if case not in SMALL.values() and (backend.few or case not in backend.rows):
        return
    for layout in testing.LAYOUTS[:2]:
        inputs, d_output = case.inputs(FLOAT32, layout=layout), case.d_output(FLOAT32, layout=layout)
        runs = []
        for threads in (1, 1, 2, 3) if backend in NATIVE else (1, 1):
            torch.set_num_threads(threads)
            try:
                runs.append(backend.evaluate(case, inputs, d_output))
            finally:
                torch.set_num_threads(1)
        for run in runs[1:]:
            assert all(torch.equal(t, runs[0][name]) for name, t in run.items()), layout


def test_no_two_rows_are_the_same() -> None:
    """Of one operator, shape and options, or one of them tests nothing; each says which branch it is there for."""
    for rows in (testing.CASES, operator_rows.TRITON, EMULATED.rows):
        told = [(case.op, str(case.shapes), str(case.options)) for case in rows]
        assert len(set(told)) == len(told)
        assert all(case.reaches for case in rows)


@pytest.mark.parametrize("variant", ["26m", "294m", "508m"])
@pytest.mark.skipif(_triton.interpreting(), reason="of the tables, whatever serves")
def test_timed_rows_are_layers_of_the_model(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed under a variant's name is what that variant calls for images of 224 x 224."""
    from mobileformer import Model

    called = set()

    def signature(op: str, x: Tensor, *others: Tensor | None, **options) -> tuple:
        stride_heads = [value for name, value in options.items() if name in ("stride", "num_heads")]
        return op, tuple(x.shape[1:]), others[0].shape.numel() // others[0].shape[0], *stride_heads

    def spy(op: str) -> Callable[..., Tensor]:
        def call(*arguments: Tensor | None, **options) -> Tensor:
            called.add(signature(op, *arguments, **options))
            return getattr(reference, op)(*arguments, **options)

        return call

    for op in OPS:
        monkeypatch.setattr(mf_kernels, op, spy(op))
    # In training the model calls it through this one, which has a name of its own for it
    monkeypatch.setattr("mf_kernels.ops.batch_norm_activation.dynamic_relu", spy("dynamic_relu"))
    with torch.device("meta"):
        Model(variant)(torch.empty(2, 3, 224, 224))
        rows = [case for case in testing.TIMED if variant in case.layer_of]
        timed = {signature(c.op, *map(torch.empty, c.shapes.values()), **c.options) for c in rows}
    assert {op for op, *_ in timed} == set(OPS)
    assert timed <= called
