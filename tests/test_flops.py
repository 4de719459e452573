"""What PyTorch's counter of operations counts: of the fused model the same as of the plain one."""

from __future__ import annotations

import pytest
import torch
from kernel_support import python

from mobileformer import Model

MODES = ["training step", "step in evaluation mode", "inference"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_the_fused_model_counts_as_the_plain_one(variant: str, mode: str) -> None:
    """Every operator, forward and backward, and the joined ones of inference."""
    counter = pytest.importorskip("torch.utils.flop_counter")
    counts = []
    for use_fused in (True, False):
        model = Model(variant, num_classes=5, use_fused=use_fused).train(mode == "training step")
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


@pytest.mark.parametrize(
    "order", [("mf_kernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "mf_kernels")]
)
def test_the_counter_knows_the_operators_whichever_is_imported_first(order: tuple[str, str]) -> None:
    code = f"import {order[0]}, {order[1]}, torch; from torch.utils.flop_counter import flop_registry as known; "
    done = python(code + "print(sum('mf_kernels' in str(name) for name in known))")
    assert done.stdout.strip() == "9", done.stderr
