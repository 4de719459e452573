"""What a right answer is, to the rows of `_cases`: an error budget derived from data.

    from mf_kernels import testing

    case = testing.CASES[0]
    inputs, d_output = case.inputs(torch.float32, layout="sliced"), case.d_output(torch.float32)
    results = testing.evaluate(case.function(mf_kernels), inputs, d_output)  # {"output": ..., "d_x": ...}
    testing.assert_within_budget(case, torch.float32, results)

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, N heads, E = C/N, K kernel side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mf_kernels import reference
from mf_kernels._cases import CASES, LAYOUTS, SMALL, TIMED, TINY, Case, in_layout

__all__ = [
    "CASES",
    "LAYOUTS",
    "SMALL",
    "TIMED",
    "TINY",
    "Case",
    "Error",
    "Expectation",
    "assert_close",
    "assert_within_budget",
    "error",
    "evaluate",
    "expectation",
    "in_layout",
    "with_saved_exponents",
]

# "One rounding" of a value, relative to it. In float64 the truth is itself rounded: a few thousand roundings.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}


def evaluate(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], d_output: Tensor | None = None
) -> dict[str, Tensor]:
    """{"output"} of function(**inputs) and, given the output's gradient, {"d_<name>"} of every input."""
    if d_output is None:
        return {"output": function(**inputs)}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), d_output)
    return {"output": output.detach()} | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


class Error(NamedTuple):
    """How far a tensor is from the truth: root mean square and largest difference; NaN if an element is."""

    typical: float
    largest: float


def error(actual: Tensor, truth: Tensor) -> Error:
    """The error of `actual`, in float64; zeros where there are no elements."""
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    difference = actual.double() - truth.double()
    return Error(difference.square().mean().sqrt().item(), difference.abs().max().item())


@dataclass(frozen=True)
class Expectation:
    """The float64 reference of one row, and the error that each of its tensors may have."""

    truth: dict[str, Tensor]
    allowed: dict[str, Error]


@functools.lru_cache(maxsize=16)
def expectation(case: Case, dtype: torch.dtype) -> Expectation:
    """What a row must give for inputs in `dtype`.

    The budget is twice the error that plain PyTorch makes in the same dtype, plus one rounding: a kernel may
    sum in another order, and no more. That holds for the root mean square; the largest difference, which a
    single unlucky sum decides, may be twice that again. On a few dozen values PyTorch may be lucky: of a
    small row the worst of a few draws counts.
    """
    function = case.function(reference)
    truths, budgets = [], []
    for seed in range(1 if case.layer_of else 4):
        inputs, d_output = case.inputs(dtype, seed=seed), case.d_output(dtype, seed=seed)
        eager = evaluate(function, inputs, d_output)
        truth = evaluate(function, {name: t.double() for name, t in inputs.items()}, d_output.double())
        truths.append(truth)
        budgets.append({name: budget(eager[name], truth[name], dtype) for name in truth})
    allowed = {name: Error(*map(max, zip(*(b[name] for b in budgets), strict=True))) for name in truths[0]}
    return Expectation(truths[0], allowed)


def budget(eager: Tensor, truth: Tensor, dtype: torch.dtype) -> Error:
    """The error that a kernel may make where plain PyTorch in `dtype` computes `eager`."""
    made, size = error(eager, truth), error(torch.zeros_like(truth), truth)
    rounding = _ROUNDING[dtype]
    return Error(2 * made.typical + rounding * size.typical, 2 * (2 * made.largest + rounding * size.largest))


def with_saved_exponents(case: Case, dtype: torch.dtype, expected: Expectation) -> dict[str, Error]:
    """The budget, with what the rounding of the saved log-sum-exp alone does to every probability of the backward pass.

    Plain PyTorch saves the probabilities themselves. A log-sum-exp of size s in float32 is off by up to s 2^-24, and
    every probability that comes from it by that factor.
    """
    if case.op != "mobile_to_former" or dtype != torch.float32 or expected.truth["output"].numel() == 0:
        return expected.allowed
    factor = saved_exponent(case, case.inputs(dtype)) * 2.0**-24
    allowed = dict(expected.allowed)
    for name in ("d_x", "d_q"):
        size = error(expected.truth[name], torch.zeros_like(expected.truth[name]))
        allowed[name] = Error(*(a + factor * s for a, s in zip(allowed[name], size, strict=True)))
    return allowed


def saved_exponent(case: Case, inputs: dict[str, Tensor]) -> float:
    """The largest size of a log-sum-exp of Mobile-to-Former's scores."""
    x, q = (t.double() for t in inputs.values())
    heads, width = case.options["num_heads"], x.shape[1] // case.options["num_heads"]
    keys, queries = x.flatten(2).unflatten(1, (heads, width)), q.unflatten(2, (heads, width))
    scores = torch.einsum("bmne,bnel->bnml", queries, keys) * width**-0.5
    return scores.logsumexp(-1).abs().max().item()


def assert_close(name: str, actual: Tensor, truth: Tensor, allowed: Error, dtype: torch.dtype) -> None:
    """`actual` has the truth's shape, the dtype, and an error within `allowed`."""
    if actual.shape != truth.shape or actual.dtype != dtype:
        got = f"{tuple(actual.shape)} {actual.dtype}"
        raise AssertionError(f"{name}: expected {tuple(truth.shape)} {dtype}, got {got}")
    made = error(actual, truth)
    if not (made.typical <= allowed.typical and made.largest <= allowed.largest):  # NaN is within no budget
        raise AssertionError(f"{name}: {made} in {dtype}, allowed {allowed}")


def assert_within_budget(case: Case, dtype: torch.dtype, results: dict[str, Tensor], *, slack: float = 1.0) -> None:
    """Every tensor of `results`, named as `evaluate` names them, is what the row expects for seed 0, `slack` wider."""
    expected = expectation(case, dtype)
    for name, actual in results.items():
        allowed = Error(*(slack * bound for bound in expected.allowed[name]))
        assert_close(f"{case.id}: {name}", actual, expected.truth[name], allowed, dtype)
