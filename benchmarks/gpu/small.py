"""What compute-sanitizer watches: every operator on both backends, forward and backward, on small maps.

compute-sanitizer --tool racecheck python -m gpu.small
"""

from __future__ import annotations

import sys

import torch

import mf_kernels
from gpu.operators import TARGETS
from mf_kernels import _triton, testing

LOOKS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))  # as `pytest -m gpu`: compiled by then


def main() -> None:
    """Every fourth row that is there for a branch; in Triton's interpreter one of each operator."""
    branches = [case for case in testing.CASES if case.op in TARGETS and not case.layer_of]
    rows = [case for case in branches if case.shapes["x"][0] > 0][::4]
    device = "cuda"
    if _triton.interpreting():
        device, rows = "cpu", list({case.op: case for case in reversed(rows)}.values())
    wrong = 0
    for case in rows:
        for backend in ("triton", "native"):
            for dtype, layout in LOOKS:
                inputs = case.inputs(dtype, layout=layout, device=device)
                d_output = case.d_output(dtype, layout=layout, device=device)
                with mf_kernels.use_backend(backend):
                    results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
                expected = testing.expectation(case, dtype)
                allowed = testing.with_saved_exponents(case, dtype, expected)
                for name, tensor in results.items():
                    try:
                        testing.assert_close(name, tensor.cpu(), expected.truth[name], allowed[name], dtype)
                    except AssertionError as error:
                        wrong += 1
                        print(f"{case.id} {backend} {layout}: {error}")
    print(f"{len(rows)} rows, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
