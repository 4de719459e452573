"""What PyTorch's counter of operations counts: of the fused model the same as of the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_support import in_forks
from tiny_support import tiny_variants

import mf_kernels
from mobileformer import Model

COUNTED = ("conv", "linear", "matmul", "addmm", "bmm", "einsum")
MODES = ["training step", "step in evaluation mode", "inference"]


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """What every operator multiplies is seen in small networks."""
    with tiny_variants():
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("variant", "spatial"), [("tiny", False), ("tiny_ungrouped", False), ("tiny_ungrouped", True)])
def test_the_fused_model_counts_as_the_plain_one(variant: str, spatial: bool, mode: str) -> None:
    """Every operator, forward and backward, and the joined ones of inference."""
    counter = pytest.importorskip("torch.utils.flop_counter")
    counts = []
    for use_fused in (True, False):
        model = Model(variant, num_classes=5, use_fused=use_fused, spatial_dynamic_relu=spatial)
        model.train(mode == "training step")
        x = torch.randn(2, 3, 64, 64)
        with torch.set_grad_enabled(mode != "inference"), counter.FlopCounterMode(display=False) as count:
            logits = model(x)
            if mode != "inference":
                logits.sum().backward()
        counts.append(count.get_total_flops())
        names = {str(name) for name in count.get_flop_counts()["Global"]}
        assert any("mf_kernels" in name for name in names) == use_fused
    fused, plain = counts
    assert fused == plain > 0


def test_the_counter_knows_the_operators_whichever_is_imported_first() -> None:
    codes = [
        f"import {first}, {second}\n"
        "from torch.utils.flop_counter import flop_registry as known\n"
        "print(sum('mf_kernels' in str(name) for name in known))"
        for first, second in (("mf_kernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "mf_kernels"))
    ]
    package = Path(mf_kernels.__file__).parents[1]
    assert [printed.strip() for printed in in_forks(codes, package)] == ["12", "12"]


@pytest.mark.filterwarnings("ignore")  # of fvcore's own imports and of tracing
@pytest.mark.parametrize(("variant", "spatial"), [("tiny", False), ("tiny_ungrouped", False), ("tiny_ungrouped", True)])
def test_fvcore_counts_the_multiply_adds_of_the_plain_model(variant: str, spatial: bool) -> None:
    """Convolutions, linear layers and matrix products; without the handles the fused operators are left out."""
    counted = pytest.importorskip("fvcore.nn")
    x, counts, missing = torch.randn(1, 3, 64, 64), [], []
    ours = {name.removeprefix("mf_kernels::") for name in mf_kernels.fvcore_handles()}
    for use_fused, handles in ((True, mf_kernels.fvcore_handles()), (True, {}), (False, {})):
        model = Model(variant, num_classes=5, use_fused=use_fused, spatial_dynamic_relu=spatial).eval()
        with torch.no_grad():
            analysis = counted.FlopCountAnalysis(model, x).set_op_handle(**handles)
            by_operator = analysis.unsupported_ops_warnings(False).by_operator()
        counts.append(sum(count for name, count in by_operator.items() if name in {*COUNTED, *ours}))
        missing.append([op for op in analysis.unsupported_ops() if op.startswith("mf_kernels::")])
    fused, without, plain = counts
    # fvcore reads what an einsum multiplies from numpy's estimate, which is printed with a few digits
    assert fused == pytest.approx(plain, rel=1e-5 if spatial else 0)
    assert without < fused
    assert missing[0] == missing[2] == []
    assert missing[1]
