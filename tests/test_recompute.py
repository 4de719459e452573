"""Gradient checkpointing: less memory, and every number of a training step as without it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor

import mf_kernels
from mobileformer import Model
from mobileformer.measure.difference import lively_weights_
from mobileformer.network.recompute import recomputed

FUSED = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])


def models(variant: str = "26m", **kwargs) -> tuple[Model, Model]:
    """Twins: the second recomputes."""
    model = Model(variant, num_classes=5, **kwargs)
    lively_weights_(model)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    return model, twin


def step(model: Model, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """(logits, gradients by name, bytes that the forward pass kept for the backward pass)."""
    torch.manual_seed(5)
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = model(x)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@FUSED
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_step_is_the_same_bit_for_bit_and_keeps_less(use_fused: bool, training: bool) -> None:
    """Also what is random in it, and the running statistics, which must count the batch once."""
    model, twin = models(use_fused=use_fused, drop_rate=0.2, drop_path_rate=0.3)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits, gradients, kept = step(model.train(training), x)
    same_logits, same_gradients, kept_less = step(twin.train(training), x)
    assert torch.equal(same_logits, logits)
    assert all(torch.equal(same_gradients[name], gradients[name]) for name in gradients)
    assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    assert kept_less < kept / 2


def test_blocks_run_twice_with_a_gradient_and_once_without() -> None:
    """Counted where the kernels are."""

    def counts(model: Model, gradient: bool) -> tuple[int, int]:
        """Calls of one kernel of every block with tokens, forward and backward."""
        with mf_kernels.record_kernels() as record, torch.set_grad_enabled(gradient):
            logits = model(torch.zeros(2, 3, 64, 64))
            if gradient:
                logits.sum().backward()
        sums = [sum(n for k, n in record.counts.items() if f"former_to_mobile_{d}" in k) for d in ("fwd", "bwd")]
        return sums[0], sums[1]

    model, twin = models()
    assert counts(model, gradient=True) == (8, 8)
    assert counts(twin, gradient=True) == (16, 8)
    assert counts(twin, gradient=False) == (8, 0)


def test_it_can_be_switched_off_again_and_is_in_no_state_dict() -> None:
    model, twin = models()
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    saved = step(twin, x)[2]
    twin.set_grad_checkpointing(False)
    assert step(twin, x)[2] > 2 * saved


def test_gradients_of_the_input_and_of_frozen_blocks() -> None:
    model, twin = models()
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for each in (model, twin):
        each.blocks[3].requires_grad_(False)
        image = x.clone().requires_grad_()
        each(image).square().sum().backward()
        gradients.append(image.grad)
        assert all(p.grad is None for p in each.blocks[3].parameters())
    assert torch.equal(gradients[0], gradients[1])


def test_a_compiled_block_recomputes() -> None:
    """The compiler writes the statistics once by itself."""
    model, twin = models()
    block, other = model.blocks[1].double(), twin.blocks[1].double()
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    tokens = torch.randn(2, 3, 128, dtype=torch.float64)
    compiled = torch.compile(lambda x, tokens: recomputed(other, x, tokens), backend="aot_eager", fullgraph=True)
    for function in (block, compiled):
        features, after = function(x, tokens)
        (features.sum() + after.square().sum()).backward()
    for (name, first), second in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, first), second in zip(block.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12, msg=name)


def test_a_block_that_fails_leaves_its_statistics_in_place() -> None:
    _, twin = models()
    norm = twin.blocks[1].expand.norm
    before = norm.running_mean
    x = torch.randn(2, 12, 8, 8, requires_grad=True)
    features, _ = recomputed(twin.blocks[1], x, torch.randn(2, 3, 128))
    handle = twin.blocks[1].project.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        features.sum().backward()
    handle.remove()
    assert norm.running_mean is before


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_second_run_is_served_by_the_backend_of_the_first(backend: str) -> None:
    """The block ends before the backward pass, or the backward pass is another thread's."""
    model, twin = (each.double() for each in models())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with mf_kernels.use_backend(backend):
        loss, same = model(x).square().sum(), twin(x).square().sum()
    loss.backward()
    with mf_kernels.use_backend("native" if backend == "reference" else "reference"):
        thread = threading.Thread(target=same.backward)
        with mf_kernels.record_kernels() as record:
            thread.start()
            thread.join()
        assert mf_kernels.requested_backend() != backend
    served = [f":{backend}" in f"{kernel}:" for kernel in record.counts]
    assert served, "nothing was run again"
    assert all(served), record.counts
    for parameter, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        assert of_twin.grad is not None
        # Another thread may compute with another number of threads, which rounds otherwise.
        torch.testing.assert_close(parameter.grad, of_twin.grad, rtol=1e-9, atol=1e-9)
