"""The processes that train together: one of them, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World", "join"]


@dataclass(frozen=True)
class World:
    """This process among all. rank 0 writes files and speaks."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over the processes, of float64 numbers: the same on every one."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def average_buffers(self, model: nn.Module) -> None:
        """Running statistics of BatchNorm become their mean over the processes; counters agree already."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size

    def share(self, tensor: Tensor) -> None:
        """Every process gets rank 0's values."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes (gloo on the CPU, nccl on GPUs), or a world of one.

    device: "cpu", "cuda:1" and so on; or "cuda": then the process takes the GPU of its LOCAL_RANK.

    Raises ValueError for one GPU that several processes would share.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device(device)
    if where.type == "cuda":
        if where.index is None:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        elif size > 1:
            raise ValueError(f"device: {size} processes want a GPU each, so 'cuda' without a number, got {device!r}")
        torch.cuda.set_device(where)
    if size == 1:
        yield World(0, 1, where)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, where)
    finally:
        dist.destroy_process_group()
