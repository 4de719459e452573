"""Gradient checkpointing: a block keeps its inputs alone, and is run again when its gradient is due."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mf_kernels import requested_backend, use_backend

__all__ = ["recomputed"]


def recomputed(block: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """block(x, tokens), of which the backward pass makes anew what it needs: same numbers, less memory, more time.

    Random numbers (stochastic depth) are drawn again as they were. The running statistics of BatchNorm take the batch
    in once: what the second run adds to them goes into copies that are dropped. The second run, which may be another
    thread's and outside of every `use_backend` block, is served by the backend of the first.
    """
    if torch.compiler.is_compiling():  # its graph writes each buffer once, whatever is computed again
        return checkpoint(block, x, tokens, use_reentrant=False)

    backend = requested_backend()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _second_run(block, backend)

    return checkpoint(block, x, tokens, use_reentrant=False, context_fn=contexts)


@contextmanager
def _second_run(block: nn.Module, backend: str) -> Iterator[None]:
    with use_backend(backend), _statistics_kept(block):
        yield


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Copies stand in for the statistics, rather than none at all: autograd counts what a second run saves."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
