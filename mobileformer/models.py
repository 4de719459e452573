"""The networks as users have them: what the network is, and the copy for inference that is made of it."""

from __future__ import annotations

import torch

from mobileformer.inference.model import InferenceModel
from mobileformer.network.classifier import Classifier
from mobileformer.network.parts import part

__all__ = ["Model"]


@part
class Model(Classifier):
    """Mobile-Former (arXiv 2108.05895): a light convolutional trunk and a few tokens, with a bridge each way.

    ====================  ==============================================================================
    argument              meaning
    ====================  ==============================================================================
    variant               "26m", "52m", "96m", "151m", "214m", "294m" or "508m"
    num_classes           width of the last layer, at least 1
    in_chans              channels of the input, at least 1
    use_fused             True: the operators of `mf_kernels`, a layout to their liking inside, BatchNorm
                          folded on the fly in evaluation mode. False: plain PyTorch, layer by layer; no
                          compiled library is ever touched. The same state dict and numbers either way.
    drop_rate             dropout before the last layer, in [0, 1)
    drop_path_rate        stochastic depth, in [0, 1); block i of n has rate * (i + 1) / n
    spatial_dynamic_relu  slopes of dynamic ReLU for every position, mixed over all tokens by the scores
                          of the bridge, in place of one slope a channel from token 0. The parameters
                          are the same.
    ====================  ==============================================================================

    Stochastic depth acts where the published code has it: on the residual of a same block, the inner branch
    of a down block, and the updates of both bridges and of the Former's attention (not its feed-forward net,
    not lite blocks; the last bridge has the full rate). It drops an update per sample. The published code,
    holding its tokens first, drops a token of the whole batch instead; every published recipe has rate 0.

    ========  ==================================  ========================================================
    tensor    shape                               dtype
    ========  ==================================  ========================================================
    x         (B, in_chans, H, W), H and W >= 32  the parameters' (any floating dtype under autocast)
    features  (B, C, ceil(H/32), ceil(W/32))      the same; every stage of stride 2 rounds up
    tokens    (B, M, D)                           the same
    logits    (B, num_classes)                    the same
    ========  ==================================  ========================================================

    Initialisation as published: convolutions N(0, sqrt(2 / (k k out_channels))), linear layers N(0, 0.01)
    with bias 0, tokens N(0, 1), norms 1 and 0.

    Raises ValueError for an argument or a shape out of range, TypeError for a wrong dtype.
    Source: the paper's section 3 and, where it is silent, the authors' code.
    """

    same_numbers = True

    def to_inference(self, dtype: torch.dtype = torch.float32, threads: int | None = None) -> InferenceModel:
        """A copy for inference, BatchNorm folded into convolutions and linear layers. Same call, same logits.

        ========  =======================================================================================
        argument  meaning
        ========  =======================================================================================
        dtype     of the arithmetic: torch.float32, torch.bfloat16 or torch.float64. The input may have
                  any floating dtype, and the logits come back in it.
        threads   CPU threads of a call. None is PyTorch's count. With a number, the engine has that many
                  threads of its own; where PyTorch runs instead, its one count for the whole process is
                  set when the call starts and put back when it ends.
        ========  =======================================================================================

        What serves a call:

        ==================  =============================================================================
        the CPU engine      float32 and bfloat16, on the CPU, where no gradient is wanted
        PyTorch, as it is   float64; `use_fused=False`; on a GPU; an input that requires a gradient; NaN
        meant               or infinity in the input; under torch.compile, torch.export and other tracers
                            and modes; where somebody has put a hook on a part
        PyTorch, and a      the compiled engine is missing; a part was replaced, say by an adapter, or
        warning once        written to in the copy. Under MF_KERNELS_STRICT=1 these raise RuntimeError.
        ==================  =============================================================================

        Later changes to this model do not reach the copy, which keeps `use_fused` and the device.
        Raises ValueError for another dtype or a thread count below 1.
        """
        return InferenceModel(self, dtype=dtype, threads=threads)
