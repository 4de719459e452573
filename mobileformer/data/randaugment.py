"""RandAugment as the published recipes use it, by timm's or torchvision's implementation."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["RandAugment"]

# What timm understands; its parser ends a misspelt key with an assertion, or silently leaves it out.
PART = re.compile(r"(?:m|n|inc|mmax)\d+|(?:p|mstd)\d+(?:\.\d+)?")


class RandAugment:
    """Some operations drawn from a list, each applied with a probability and at a random magnitude.

    policy: parts joined by "-". m9: magnitude 9 of 10; mstd0.5: each time drawn from N(9, 0.5), within 0 .. 10; n2:
    two operations drawn, with replacement; p0.5: each applied with probability 0.5; inc1: the set of operations
    that grow stronger with the magnitude; mmax: upper bound of the magnitude. Without a part, timm's default stands:
    m10, n2, p0.5, inc0. With 15 operations this is what the published recipes call "rand-m9-mstd0.5".

    timm serves where it can be imported. Else torchvision does, with a warning once, since its RandAugment is another
    one: 14 operations, always applied, at one magnitude.

    A call takes (image, generator): both libraries draw from global generators, which are seeded from this one for
    the time of the call and put back.

    Source: E. Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space".

    Raises:
        ValueError: the policy has a part that is not known.
        ImportError: neither timm nor torchvision can be imported.
    """

    def __init__(self, policy: str, *, size: int, mean: Sequence[float], filters: Sequence[Image.Resampling]) -> None:
        parts = policy.split("-")
        unknown = [part for part in parts if not PART.fullmatch(part)]
        if unknown:
            raise ValueError(f"randaugment: unknown part {unknown[0]!r} of {policy!r}, expected e.g. 'm9-mstd0.5'")
        self.policy, self.size, self.filters = policy, size, tuple(filters)
        fill = [min(255, round(255 * value)) for value in mean]
        self.fill: Any = fill[0] if len(fill) == 1 else tuple(fill)
        self.library, self._apply = self._open()
        if self.library == "torchvision":
            warnings.warn(
                f"randaugment: timm cannot be imported, so torchvision's RandAugment stands in for {policy!r}: "
                "other operations, always applied, and no spread of the magnitude",
                stacklevel=2,
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        with seeded_globals(int(rng.integers(2**32)), torch_too=self.library == "torchvision"):
            return self._apply(image)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("library", "_apply")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.library, self._apply = self._open()

    def _open(self) -> tuple[str, Callable[[Image.Image], Image.Image]]:
        from mobileformer._torchvision import ensure_torchvision

        try:
            ensure_torchvision()
            from timm.data.auto_augment import rand_augment_transform
        except ImportError:
            return "torchvision", self._open_torchvision()
        hparams: dict[str, Any] = {"translate_const": int(self.size * 0.45), "img_mean": self.fill}
        if len(self.filters) == 1:
            hparams["interpolation"] = self.filters[0]
        return "timm", rand_augment_transform(f"rand-{self.policy}", hparams)

    def _open_torchvision(self) -> Callable[[Image.Image], Image.Image]:
        try:
            from torchvision.transforms import InterpolationMode
            from torchvision.transforms import RandAugment as Other
        except ImportError as error:
            raise ImportError(
                "randaugment: needs timm or torchvision, and neither can be imported: pip install 'mobileformer[timm]'"
            ) from error
        parts = dict(re.findall(r"([a-z]+)([\d.]+)", self.policy))
        return Other(
            num_ops=int(parts.get("n", 2)),
            magnitude=int(parts.get("m", 10)),
            num_magnitude_bins=11,  # timm's scale: 10 is the strongest
            interpolation=InterpolationMode.BILINEAR,
            fill=self.fill,
        )


@contextmanager
def seeded_globals(seed: int, *, torch_too: bool = False) -> Iterator[None]:
    """The global generators of Python and numpy, or torch's, seeded inside and as they were after."""
    if torch_too:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
        return
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what timm draws from)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
