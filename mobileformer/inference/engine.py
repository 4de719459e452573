"""The network on the CPU without torch: numpy in, numpy out.

Legend: B batch, C channels, H W height and width, M tokens, D token width.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Literal, NoReturn

import numpy as np

from mobileformer.config import MIN_SIZE, VariantConfig
from mobileformer.files.metadata import Metadata
from mobileformer.inference.folded import FoldedNetwork
from mobileformer.inference.library import chosen_isa, library
from mobileformer.inference.threads import check_threads

__all__ = ["DTYPES", "Engine", "NotFiniteError"]

DTYPES = ("float32", "bfloat16")


class NotFiniteError(ValueError):
    """The input holds NaN or infinity."""


class Engine:
    """A folded network, ready to run on the CPU: `Engine(path)(images)` are the logits.

    ========  ==========================================================================================
    argument  meaning
    ========  ==========================================================================================
    source    a file that `FoldedNetwork.save` or `mobileformer convert --fold` wrote, or the network itself
    dtype     "float32", or "bfloat16": matrix products of bfloat16 numbers, summed in float32; the rest
              in float32. What goes in and comes out is the same.
    threads   CPU threads of a call, at most four for each CPU of the process (or 64, where that is more).
              They belong to this engine and sleep soon after a call.
    isa       "baseline", "avx2", "avx512", "avx512bf16" or "amx"; None is what the environment variable
              MF_ENGINE_ISA says, else the best one of this CPU
    ========  ==========================================================================================

    ========  =================================================================================
    array     shape, dtype
    ========  =================================================================================
    x         (B, in_chans, H, W) float32, normalised as for training; or (B, H, W, in_chans) uint8, which is
              normalised inside: (images / 255 - mean) / std. H and W from 32, B from 0, any strides.
    logits    (B, num_classes) float32
    ========  =================================================================================

    Any number of Python threads may call one engine at the same time; the interpreter's lock is released meanwhile.
    An engine belongs to its process: it can be neither copied nor pickled, open the file again instead.

    Raises OSError and WeightsError for a file as `FoldedNetwork.load` does, ValueError for weights held as integers
    and for another argument out of range, RuntimeError with the reason where the compiled library is missing or the
    system refuses a thread.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | FoldedNetwork,
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int = 1,
        *,
        isa: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        check_threads(threads)
        isa = chosen_isa(isa)
        folded = source if isinstance(source, FoldedNetwork) else FoldedNetwork.load(source)
        if folded.integers:
            first, more = folded.integers[0], len(folded.integers) - 1
            raise ValueError(
                f"source: expected a network of float32 arrays, got {folded.arrays[first].dtype} in {first}"
                f"{f' and integers in {more} more' if more else ''}, which this engine does not run"
            )
        arrays = {name: np.ascontiguousarray(array) for name, array in folded.arrays.items()}
        self._metadata, self._config, self._dtype = folded.metadata, folded.config, dtype
        self._network = library().Network(_plain(folded), arrays, dtype, threads, isa)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x -> logits (B, num_classes).

        Raises TypeError for another dtype; ValueError for another shape, for NaN or infinity in x, and for
        uint8 where the file says no mean and std.
        """
        return self._network.forward(self._checked(x))

    forward = __call__

    def forward_features(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """x -> ([maps (B,C,h,w) at strides 4, 8, 16 and 32], tokens (B,M,D) of the last bridge).

        A map is what the last block of its resolution gave, with h = ceil(H / stride). Raises as a call does.
        """
        maps, tokens = self._network.forward_features(self._checked(x))
        return list(maps), tokens

    def stages(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Everything between, for finding out where two networks part: name -> array, in the order of execution.

        ====================================  ===========================================================
        name                                  what
        ====================================  ===========================================================
        stem                                  (B,C,H,W) after its ReLU6
        blocks.N.<convolution>                (B,C,H,W) after its activation
        blocks.N.<convolution>_relu           (B,2C) coefficients of its dynamic ReLU, in [0, 1]
        blocks.N.mobile_to_former             (B,M,D) tokens after the bridge in
        blocks.N.tokens                       (B,M,D) tokens after the Former
        blocks.N                              (B,C,H,W) what the block gives on
        tokens                                (B,M,D) after the last bridge
        pooled, hidden, logits                (B,...) of the classifier
        ====================================  ===========================================================
        """
        return dict(self._network.stages(self._checked(x)))

    def profile(self, x: np.ndarray, repeats: int = 20) -> list[tuple[str, float, int]]:
        """[(stage, seconds, multiply-adds)] in the order of execution: of each stage its fastest of `repeats` runs."""
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats!r}")
        return [tuple(row) for row in self._network.profile(self._checked(x), repeats)]

    @property
    def metadata(self) -> Metadata:
        """What the file says of itself."""
        return self._metadata

    @property
    def config(self) -> VariantConfig:
        """The variant's configuration."""
        return self._config

    @property
    def variant(self) -> str:
        """Name of the variant, for instance "294m"."""
        return self._metadata.variant

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self._metadata.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self._metadata.in_chans

    @property
    def labels(self) -> tuple[str, ...] | None:
        """One name a class, where the file has them."""
        return self._metadata.labels

    @property
    def mean(self) -> tuple[float, ...] | None:
        """What is subtracted from pixels in [0, 1], one number a channel."""
        return self._metadata.mean

    @property
    def std(self) -> tuple[float, ...] | None:
        """What they are divided by then."""
        return self._metadata.std

    @property
    def dtype(self) -> str:
        """ "float32" or "bfloat16"."""
        return self._dtype

    @property
    def threads(self) -> int:
        """CPU threads of a call."""
        return self._network.threads

    @property
    def isa(self) -> str:
        """The instruction set that runs."""
        return self._network.isa

    def __repr__(self) -> str:
        return f"Engine({self.variant}, {self.dtype}, threads={self.threads}, isa={self.isa})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine belongs to its process and cannot be copied or pickled: open the file again")

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """x, C-contiguous, or an error in words."""
        if not isinstance(x, np.ndarray):
            raise TypeError(f"x: expected a numpy array, got {type(x).__name__}")
        channels_last = x.dtype == np.uint8
        if not channels_last and x.dtype != np.float32:
            raise TypeError(
                f"x: expected float32 (B, {self.in_chans}, H, W) or uint8 (B, H, W, {self.in_chans}), "
                f"got {x.dtype} {x.shape}"
            )
        expected = f"(B, H, W, {self.in_chans})" if channels_last else f"(B, {self.in_chans}, H, W)"
        if x.ndim != 4:
            raise ValueError(f"x: expected 4 dimensions {expected}, got shape {x.shape}")
        channels = x.shape[3 if channels_last else 1]
        height, width = x.shape[1:3] if channels_last else x.shape[2:]
        if channels != self.in_chans:
            raise ValueError(f"x: expected {self.in_chans} channels, got {channels} (shape {x.shape})")
        if height < MIN_SIZE or width < MIN_SIZE:
            raise ValueError(f"x: expected height and width of at least {MIN_SIZE}, got {height} x {width}")
        if channels_last and (self.mean is None or self.std is None):
            raise ValueError("x: the network says no mean and std to normalise uint8 with; give float32")
        if not channels_last and not np.isfinite(x).all():
            raise NotFiniteError("x: holds NaN or infinity")
        return np.ascontiguousarray(x)


def _plain(folded: FoldedNetwork) -> dict[str, Any]:
    """What the compiled network is to be, as plain values."""
    config, metadata = folded.config, folded.metadata
    return {
        "stem_channels": config.stem_channels,
        "blocks": [asdict(block) for block in config.blocks],
        "num_tokens": config.num_tokens,
        "token_dim": config.token_dim,
        "hidden_features": config.hidden_features,
        "groups": config.groups,
        "in_chans": metadata.in_chans,
        "num_classes": metadata.num_classes,
        "spatial_dynamic_relu": metadata.spatial_dynamic_relu,
        "mean": None if metadata.mean is None else list(metadata.mean),
        "std": None if metadata.std is None else list(metadata.std),
    }
