"""What a user would pick instead of Mobile-Former: other networks, random weights, as ONNX files to be timed.

Definitions are those of timm and torchvision, which only benchmarks import. Their versions that fit this torch are
installed without their dependencies, which would replace it:

    pip install --no-deps timm==1.0.31 torchvision==0.28.0 && pip install huggingface_hub

Accuracy is published, at 224 x 224 unless said, and was not measured here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mobileformer._torchvision import ensure_torchvision
from mobileformer.files.replacing import replacing
from mobileformer.measure.difference import lively_weights_

__all__ = ["PEERS", "Peer", "write_onnx"]


@dataclass(frozen=True)
class Peer:
    """A network: who published which top-1 accuracy on ImageNet-1k, in percent, and how to build it.

    lively: fill it with `lively_weights_`, since its own initial weights make values that all but vanish on the way,
    where denormal ones would cost time that trained weights do not. The sums of RepViT's branches grow with them.
    """

    name: str
    top1: float
    source: str
    build: Callable[[], nn.Module]
    lively: bool = True


def write_onnx(peer: Peer, folder: Path) -> Path:
    """Write the network, with a free batch, as `<name>.onnx`; a file that is there already is kept.

    What can be merged for inference is: branches that training needs, norms into what stands before them. Weights are
    random, with a fixed seed. Raises RuntimeError where they give values that are not finite.
    """
    path = folder / f"{peer.name}.onnx"
    if path.exists():
        return path
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peer.build().eval()
    if peer.lively:
        lively_weights_(model)
    model = _merged(model)
    example = torch.zeros(2, 3, 224, 224)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if not torch.isfinite(model(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))).all():
            raise RuntimeError(f"{peer.name}: random weights give values that are not finite")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    with replacing(path) as temporary:
        program.save(temporary)
    return path


def _merged(model: nn.Module) -> nn.Module:
    """RepViT's branches as one, LeViT's norms in its layers. Norms after convolutions are merged by the export."""
    ensure_torchvision()
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        ensure_torchvision()  # timm imports it where it is installed
        return importlib.import_module("timm").create_model(name, pretrained=False)

    return build


def _mobilenet_v3_large(width: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        ensure_torchvision()
        definitions = importlib.import_module("torchvision.models.mobilenetv3")
        blocks, last = definitions._mobilenet_v3_conf("mobilenet_v3_large", width_mult=width)
        return definitions.MobileNetV3(blocks, last)

    return build


def _shufflenet() -> nn.Module:
    ensure_torchvision()
    return importlib.import_module("torchvision.models.shufflenetv2").shufflenet_v2_x1_5(weights=None)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("MobileNetV3-L", 75.2, "arXiv 1905.02244", _mobilenet_v3_large(1.0)),
        Peer("MobileNetV3-L 1.25x", 76.6, "arXiv 1905.02244", _mobilenet_v3_large(1.25)),
        Peer("MobileNetV4-Conv-M", 79.1, "timm's e500_r224_in1k", _timm("mobilenetv4_conv_medium")),
        Peer("LeViT-128", 78.5, "timm's fb_dist_in1k", _timm("levit_128")),
        Peer("HGNetV2-B1", 78.9, "timm's ssld_stage2_ft_in1k", _timm("hgnetv2_b1")),
        Peer("RepViT-M0.9", 79.1, "timm's dist_450e_in1k", _timm("repvit_m0_9"), lively=False),
        Peer("EfficientNet-B0", 78.6, "timm's ra4_e3600_r224_in1k", _timm("efficientnet_b0")),
        Peer("ShuffleNetV2-1.5x", 73.0, "torchvision's IMAGENET1K_V1", _shufflenet),
    )
}
