"""What traces a model without running it on numbers: `torch.fx`, and tensors of other classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mf_kernels
from mobileformer import Model
from mobileformer.measure.difference import lively_weights_


def network(use_fused: bool, training: bool = False, variant: str = "26m") -> Model:
    model = Model(variant, num_classes=5, use_fused=use_fused).train(training)
    lively_weights_(model)
    return model


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_a_symbolic_trace_computes_the_same_for_any_batch(use_fused: bool, training: bool, variant: str) -> None:
    model = network(use_fused, training, variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = torch.fx.symbolic_trace(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    functions = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert (mf_kernels.mobile_to_former in functions) == use_fused
    for batch, side in ((2, 64), (3, 96)):
        x = torch.randn(batch, 3, side, side)
        model.load_state_dict(before)
        got = graph(x)
        model.load_state_dict(before)
        want = model(x)
        # in training, statistics of a few values magnify what float32 rounds
        assert (got - want).abs().max() < (1e-2 if training else 1e-5) * want.abs().max()


class Marked(Tensor):
    """A tensor of somebody's class."""


def test_an_operator_keeps_the_class_of_a_tensor_as_torch_does() -> None:
    x, theta = torch.randn(1, 4, 3, 3), torch.randn(1, 8)
    y = mf_kernels.dynamic_relu(x.as_subclass(Marked), theta)
    assert type(y) is Marked
    assert torch.equal(y.as_subclass(Tensor), mf_kernels.dynamic_relu(x, theta))
