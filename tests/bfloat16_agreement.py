"""How often bfloat16 names the class that float32 names, and how far its logits are off.

    python tests/bfloat16_agreement.py [--images 1000] [--size 224] [--isa NAME] [VARIANT ...]
    python tests/bfloat16_agreement.py --trained FOLDER [--isa NAME]

The first takes the golden recipe's weights and images: classes lie closer together there than those of a trained
network, whose errors are smaller where it is sure. The second takes the weights in the package, and Fashion-MNIST's
test images from a folder with its files. Prints one row a network; exits with 1 where the agreement is below 99 % or
the relative error of the logits above 0.02.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from golden import recipe

from mobileformer.config import VARIANTS
from mobileformer.inference import Engine, FoldedNetwork

AGREEMENT, RELATIVE_ERROR = 0.99, 0.02


def measure(network: FoldedNetwork, batches: Iterable[np.ndarray], *, isa: str | None = None) -> dict[str, float]:
    """{"agreement": share of equal classes, "relative_error": of the logits, |bfloat16 - float32| / |float32|}."""
    exact, short = Engine(network, isa=isa), Engine(network, "bfloat16", isa=isa)
    images, same, off, norm = 0, 0, 0.0, 0.0
    for x in batches:
        a, b = exact(x), short(x)
        images += len(x)
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        off += float(np.square(a - b).sum(dtype=np.float64))
        norm += float(np.square(a).sum(dtype=np.float64))
    return {"agreement": same / images, "relative_error": (off / norm) ** 0.5}


def recipe_images(images: int, size: int, batch: int = 20) -> Iterator[np.ndarray]:
    for start in range(0, images, batch):
        yield recipe.image(min(batch, images - start), size, size, 1000 + start)


def trained(folder: str) -> tuple[FoldedNetwork, Iterator[np.ndarray]]:
    """The network in the package, and the test images in `folder` as it wants them."""
    from mobileformer import load_model, read_metadata
    from mobileformer.data import EvaluationTransform, evaluation_batches, open_source
    from mobileformer.inference import fold
    from mobileformer.pretrained import shipped_weights

    metadata = read_metadata(shipped_weights())
    transform = EvaluationTransform(
        metadata.input_size, metadata.mean, metadata.std, crop_fraction=metadata.crop_fraction
    )
    batches = evaluation_batches(open_source(folder, "val", channels=1), transform, batch_size=50)
    return fold(load_model(shipped_weights())), (batch.x.numpy() for batch in batches)


def report(name: str, found: dict[str, float]) -> bool:
    """Print the row; does it hold?"""
    agreement, error = found["agreement"], found["relative_error"]
    print(f"{name:>5}  top-1 equal {agreement:.2%}  relative error {error:.2e}", flush=True)
    return agreement >= AGREEMENT and error <= RELATIVE_ERROR


def main() -> int:
    from engine_support import folded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--isa")
    parser.add_argument("--trained", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.trained:
        network, batches = trained(arguments.trained)
        return int(not report("52m", measure(network, batches, isa=arguments.isa)))
    holds = [
        report(variant, measure(folded(variant), recipe_images(arguments.images, arguments.size), isa=arguments.isa))
        for variant in arguments.variants or VARIANTS
    ]
    return int(not all(holds))


if __name__ == "__main__":
    sys.exit(main())
