"""MobileNetV3-Large from timm, with one kernel for every depthwise convolution that a hard swish follows.

    python examples/mobilenetv3.py [--model mobilenetv3_large_100] [--batch 1] [--size 224] [--threads 1]

Needs timm (`pip install 'mobileformer[timm]'`). Weights are random, so that nothing is fetched; speed does not depend
on them. The original, the same with its BatchNorm folded, and that with the kernel, in both memory layouts, take turns;
each has to give the original's logits, computed in float64, to 1e-5 of the largest. `replace_` is what to copy.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import mf_kernels
from mobileformer._torchvision import ensure_torchvision
from mobileformer.measure.difference import difference, lively_weights_
from mobileformer.measure.timing import interleaved

BOUND = 1e-5  # difference of a logit over the largest logit; the original in float32 is itself off by 3e-7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class DepthwiseHardswish(nn.Module):
    """hardswish(convolution(x)) in one pass, with the weights of a depthwise convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        return mf_kernels.depthwise_conv2d(x, self.weight, self.bias, stride=self.stride, activation="hardswish")


def replace_(network: nn.Module, *, kernel: bool = True) -> int:
    """Fold BatchNorm in a network in evaluation mode, put the kernel where it serves, and count how often it does."""
    replaced = 0
    for parent in list(network.modules()):
        for (name, conv), (next_name, norm) in pairwise(list(parent.named_children())):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            folded, activation = fuse_conv_bn_eval(conv, norm), getattr(norm, "act", nn.Identity())
            if kernel and serves(folded) and isinstance(activation, nn.Hardswish):
                folded, activation, replaced = DepthwiseHardswish(folded), nn.Identity(), replaced + 1
            setattr(parent, name, folded)
            setattr(parent, next_name, activation)  # timm keeps it in the norm; elsewhere it may be the next child
    return replaced


def serves(conv: nn.Conv2d) -> bool:
    """Whether the kernel computes a convolution of this kind."""
    k = conv.kernel_size[0]
    kind = (conv.groups, conv.kernel_size, conv.padding, conv.dilation, conv.padding_mode)
    same = kind == (conv.in_channels, (k, k), (k // 2, k // 2), (1, 1), "zeros")
    return same and k in (3, 5) and conv.stride in ((1, 1), (2, 2))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilenetv3_large_100", help="name in timm's registry")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)

    ensure_torchvision()  # timm imports it
    import timm

    torch.set_num_threads(args.threads)
    original = timm.create_model(args.model).eval()
    lively_weights_(original)
    folded, fused = copy.deepcopy(original), copy.deepcopy(original)
    replace_(folded, kernel=False)
    replaced = replace_(fused)

    image = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    runs = {}
    with torch.inference_mode():
        truth = copy.deepcopy(original).double()(image.double())
        for what, network in {"original": original, "BatchNorm folded": folded, "and the kernel": fused}.items():
            for layout, memory_format in LAYOUTS.items():
                mine = copy.deepcopy(network).to(memory_format=memory_format)
                x = image.contiguous(memory_format=memory_format)
                with mf_kernels.record_kernels() as record:
                    error = difference(mine(x), truth).relative
                assert error < BOUND, f"{what}, {layout}: logits differ by {error:.1e} of the largest"
                assert sum(record.counts.values()) == (replaced if network is fused else 0)
                runs[f"{what}, {layout}"] = (lambda mine=mine, x=x: mine(x)), error, record.counts
        times = interleaved({name: run for name, (run, _, _) in runs.items()}, repeats=args.repeats)

    print(f"{args.model}: {replaced} depthwise convolutions with hard swish, batch {args.batch}, {args.size} pixels")
    best = min(timing.min_ms for name, timing in times.items() if name.startswith("original"))
    for name, timing in times.items():
        _, error, counts = runs[name]
        kernels = ", ".join(counts) or "PyTorch"
        print(f"{name:32} {timing.min_ms:8.2f} ms {best / timing.min_ms:5.2f}x  off by {error:.0e}  {kernels}")


if __name__ == "__main__":
    main()
