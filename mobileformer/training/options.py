"""What a run is given besides its recipe, and what does not change its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a run, what does not change its numbers.

    ==============  ===========================================================================================
    output          folder of everything the run writes; created if need be
    weights         initial weights; what answers for another number of classes starts anew
    use_fused       the fused operators, or plain PyTorch
    workers         processes that load images; 0 is the training process itself
    save_minutes    between two checkpoints inside an epoch
    max_broken      images that may be unreadable before the run ends
    fresh           begin again where the folder holds a run
    extend          go on with a run whose recipe had other `epochs` or `cooldown_epochs`; the learning rate is that of
                    the longer recipe from there on
    log_updates     updates between two lines of the log
    ==============  ===========================================================================================
    """

    output: Path
    weights: Path | None = None
    use_fused: bool = True
    workers: int = 0
    save_minutes: float = 10.0
    max_broken: int = 100
    fresh: bool = False
    extend: bool = False
    log_updates: int = 20
