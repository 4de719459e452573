"""The kernels that the operators' properties are held to: what each is called with, how, and that it is what ran.

A property of an operator is one function, in `test_operators.py` or `test_operator_values.py`, and every backend that
this process has runs it: the CPU's kernels in each instruction set and the CUDA kernels on the host, or, where
TRITON_INTERPRET=1 was set before the first import, the Triton kernels in Triton's interpreter. `test_triton.py` starts
that process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import emulator_support
import operator_rows
import torch
from kernel_support import native, runnable
from operator_rows import SMALL
from torch import Tensor

import mf_kernels
from mf_kernels import _native, _triton, testing
from mf_kernels.testing import Case, Error

Results = dict[str, Tensor]
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Backend:
    """One kind of kernel. `evaluate` gives the output and every gradient, and raises where another kernel served."""

    name: str
    evaluate: Callable[[Case, Results, Tensor], Results]
    looks: dict[torch.dtype, tuple[str, ...]]  # layouts for each dtype
    rows: tuple[Case, ...]
    largest: tuple[Case, ...] = ()  # real layers, which differ from the rows in their size alone
    few: bool = False  # slow: small rows and one place tell where others see all
    in_half: tuple[Case, ...] | None = None  # the rows for dtypes of 16 bits, where that is not all
    views_of_small: tuple[torch.dtype, ...] = ()  # in which views into other memory are taken of the small rows alone
    slack: float = 1.0
    saves_exponents: bool = False  # of the softmax, as their logarithms in float32

    @property
    def exact(self) -> torch.dtype:
        """The widest dtype."""
        return max(self.looks, key=lambda dtype: dtype.itemsize)

    def allowed(self, case: Case, dtype: torch.dtype) -> dict[str, Error]:
        """The error budget of a row."""
        expected = testing.expectation(case, dtype)
        allowed = testing.with_saved_exponents(case, dtype, expected) if self.saves_exponents else expected.allowed
        return {name: Error(*(self.slack * bound for bound in error)) for name, error in allowed.items()}

    def layouts(self, case: Case, dtype: torch.dtype) -> tuple[str, ...]:
        """What a row is called with in a dtype."""
        layouts = self.looks[dtype]
        plain = case in self.largest or (dtype in self.views_of_small and case not in SMALL.values())
        return tuple(layout for layout in layouts if layout in testing.LAYOUTS[:2]) if plain else layouts

    def takes(self, case: Case, dtype: torch.dtype) -> bool:
        """Whether a row is called with a dtype."""
        rows = self.in_half if self.in_half is not None and dtype.itemsize == 2 else self.rows
        return dtype in self.looks and (
            case.id in {row.id for row in rows} or (dtype == FLOAT32 and case in self.largest)
        )

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(layout for layout in ("sliced", "unaligned") if layout in self.looks[FLOAT32])

    @property
    def small(self) -> tuple[Case, ...]:
        """For properties that do not depend on the branch."""
        return (*SMALL.values(), *(() if self.few else operator_rows.FILTERS))


def _native_of(isa: str) -> Backend:
    def evaluate(case: Case, inputs: Results, d_output: Tensor) -> Results:
        before = _native.cpu_report()["isa"]
        _native.set_cpu_isa(isa)
        try:
            with mf_kernels.record_kernels() as record:
                results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
        finally:
            _native.set_cpu_isa(before)
        assert record.counts == native(f"{case.op}_fwd", f"{case.op}_bwd", isa=isa)
        return results

    return Backend(
        f"native-{isa}",
        evaluate,
        dict.fromkeys((FLOAT32, BFLOAT16, FLOAT64), testing.LAYOUTS),
        operator_rows.BRANCHES,
        operator_rows.LAYERS if isa == runnable()[-1] else (),
        # The baseline has no fused multiply-add, which PyTorch's own products use: each of its terms is rounded twice.
        # How near PyTorch comes, and with it the budget, differs from one make of processor to another.
        slack=1.5 if isa == "baseline" else 1.0,
    )


def _interpreted(case: Case, inputs: Results, d_output: Tensor) -> Results:
    with mf_kernels.use_backend("triton"), mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    assert record.counts == {f"{case.op}_fwd:triton:cpu": 1, f"{case.op}_bwd:triton:cpu": 1}
    return results


def _emulated(case: Case, inputs: Results, d_output: Tensor) -> Results:
    results, ran = emulator_support.evaluate(case, inputs, d_output)
    helpers = ("merge_parts", "sum_parts", "finish_filters", "finish_slopes")
    assert all(kernel.startswith((case.op, *helpers)) for kernel in ran), ran
    if inputs["x"].numel():
        assert len({"_backward" in kernel for kernel in ran if kernel.startswith(case.op)}) == 2, ran
    return results


NATIVE = tuple(_native_of(isa) for isa in runnable())
INTERPRETED = Backend(
    "triton",
    _interpreted,
    {FLOAT32: testing.LAYOUTS, BFLOAT16: testing.LAYOUTS[:2], FLOAT16: ("channels_last",)},
    operator_rows.unique(operator_rows.TRITON, SMALL.values()),
    few=True,
    in_half=operator_rows.TRITON_IN_HALF,
    views_of_small=(FLOAT32,),
)
EMULATED = Backend(
    "cuda",
    _emulated,
    # Other strides are copied before a kernel runs
    dict.fromkeys((FLOAT32, FLOAT16, BFLOAT16), ("contiguous", "channels_last", "unaligned")),
    # Several tasks at one result are a matter of the CPU's kernels; here blocks and parts have rows of their own
    operator_rows.unique(
        [case for case in operator_rows.BRANCHES if case not in operator_rows.SPLIT], operator_rows.CUDA
    ),
    # Without alignment every dtype takes the same way, one value a load
    views_of_small=(FLOAT16, BFLOAT16),
    saves_exponents=True,
)

SETS = ("baseline", "avx2", "avx512")
NOT_HERE = {f"native-{isa}": f"this CPU has no {isa}" for isa in SETS if isa not in runnable()}
if emulator_support.missing():
    NOT_HERE["cuda"] = emulator_support.missing()
BACKENDS = (INTERPRETED,) if _triton.interpreting() else (*NATIVE, *([] if "cuda" in NOT_HERE else [EMULATED]))
