"""The text of a model card: what a weight file says of itself, what the network costs, how to load it."""

from __future__ import annotations

import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from mobileformer.config import MIN_SIZE
from mobileformer.files.metadata import Metadata
from mobileformer.network.classifier import Classifier

__all__ = ["card_text", "multiply_adds"]

SIZE = 224  # of an image where nothing else is told
SHOWN = 20  # classes that are named in the card; the weight file has them all


def card_text(metadata: Metadata, parameters: int, repo_id: str | None = None) -> str:
    """Markdown, without a head. `repo_id`: what `from_pretrained` is shown with; else a placeholder."""
    size = metadata.input_size or SIZE
    rows = {
        "variant": metadata.variant,
        "classes": _classes(metadata),
        "input": f"(B, {metadata.in_chans}, H, W), H and W from {MIN_SIZE}; {_trained_for(metadata)}",
        "normalisation": _normalisation(metadata),
        "parameters": f"{parameters:,}".replace(",", " "),
        "multiply-adds": f"{multiply_adds(metadata, size) / 1e6:.1f} M for one {size} x {size} image "
        "(convolutions, linear layers, attention; torch.utils.flop_counter / 2)",
    }
    if metadata.spatial_dynamic_relu:
        rows["dynamic ReLU"] = "slopes by position"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Mobile-Former {metadata.variant}

An image classifier: a light convolutional network with a handful of tokens beside it
([arXiv 2108.05895](https://arxiv.org/abs/2108.05895)), for the `mobileformer` package.

| | |
|---|---|
{table}

## Use

```python
{_usage(metadata, size, repo_id or "PATH_OR_REPOSITORY")}```

`mobileformer.load_model("model.safetensors")` opens the file of weights without the hub;
`mobileformer convert model.safetensors engine.safetensors --fold` makes one that runs with numpy alone.
"""


def multiply_adds(metadata: Metadata, size: int) -> int:
    """Of one image of that size, as PyTorch's own counter has it: two operations are one multiply-add."""
    with torch.device("meta"):
        model = Classifier.from_metadata(metadata, use_fused=False).eval()
        image = torch.empty(1, metadata.in_chans, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def _classes(metadata: Metadata) -> str:
    if metadata.labels is None:
        return f"{metadata.num_classes}, without names"
    # Names are anybody's text: one line, and no bar that would end the cell.
    names = [" ".join(label.split()).replace("|", "\\|") for label in metadata.labels[:SHOWN]]
    more = f", and {metadata.num_classes - SHOWN} more" if metadata.num_classes > SHOWN else ""
    return f"{metadata.num_classes}: {', '.join(names)}{more}"


def _trained_for(metadata: Metadata) -> str:
    if metadata.input_size is None:
        return "the weights do not say for which size they were trained"
    return f"trained for {metadata.input_size} x {metadata.input_size}"


def _normalisation(metadata: Metadata) -> str:
    if metadata.mean is None or metadata.std is None:
        return "not told"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (metadata.mean, metadata.std))
    return f"pixels in [0, 1], minus {mean}, over {std}"


def _usage(metadata: Metadata, size: int, repo_id: str) -> str:
    """Code that runs: from an image file where the model can say how, else from a tensor."""
    load = f"model = Model.from_pretrained({json.dumps(repo_id)}).to_inference()\n"
    if metadata.in_chans not in (1, 3) or metadata.mean is None or metadata.std is None:
        shape = f"(1, {metadata.in_chans}, {size}, {size})"
        return f"import torch\nfrom mobileformer.hub import Model\n\n{load}logits = model(torch.randn{shape})\n"
    crop = "" if metadata.crop_fraction is None else f", crop_fraction={metadata.crop_fraction}"
    return f"""\
import torch
from mobileformer.data import load_image
from mobileformer.hub import Model

{load}x = load_image("image.jpg", size={size}, mean={metadata.mean}, std={metadata.std}{crop})
probabilities = model(torch.from_numpy(x[None])).softmax(dim=1)
"""
