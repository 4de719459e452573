"""How often bfloat16 names the class that float32 names, and how far its logits are off.

    python tests/bfloat16_agreement.py [--images 1000] [--size 224] [--isa NAME] [VARIANT ...]

Weights and images are the golden recipe's: classes lie closer together than those of a trained network, whose errors
are smaller where it is sure. Prints one row a variant; exits with 1 where the agreement is below 99 % or the relative
error of the logits above 0.02.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from golden import recipe

from mobileformer.config import VARIANTS
from mobileformer.inference import Engine, FoldedNetwork

AGREEMENT, RELATIVE_ERROR = 0.99, 0.02


def measure(network: FoldedNetwork, *, images: int, size: int, isa: str | None = None, batch: int = 20) -> dict:
    """{"agreement": share of equal classes, "relative_error": of the logits, |bfloat16 - float32| / |float32|}."""
    exact, short = Engine(network, isa=isa), Engine(network, "bfloat16", isa=isa)
    same, off, norm = 0, 0.0, 0.0
    for start in range(0, images, batch):
        x = recipe.image(min(batch, images - start), size, size, 1000 + start)
        a, b = exact(x), short(x)
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        off += float(np.square(a - b).sum(dtype=np.float64))
        norm += float(np.square(a).sum(dtype=np.float64))
    return {"agreement": same / images, "relative_error": (off / norm) ** 0.5}


def main() -> int:
    from engine_support import folded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--isa")
    arguments = parser.parse_args()
    failed = False
    for variant in arguments.variants or VARIANTS:
        found = measure(folded(variant), images=arguments.images, size=arguments.size, isa=arguments.isa)
        agreement, error = found["agreement"], found["relative_error"]
        print(f"{variant:>5}  top-1 equal {agreement:.2%}  relative error {error:.2e}", flush=True)
        failed |= agreement < AGREEMENT or error > RELATIVE_ERROR
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
