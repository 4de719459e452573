"""Losses that detectors share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross-entropy of independent classes, in which what is already right counts little.

    With p = sigmoid(logit) where the target is 1 and 1 - sigmoid(logit) where it is 0, and `alpha` the weight of the
    first kind, 1 - `alpha` that of the second:

        loss = -weight (1 - p)^gamma log p

    ========  =====  ==================================================
    tensor    shape  values
    ========  =====  ==================================================
    logits    any    before the sigmoid, float
    targets   same   0 or 1 (between them: the mixture), same dtype
    returns   same   one loss for each element, not summed
    ========  =====  ==================================================

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + targets - 2 * probability * targets
    weight = 1 - alpha + (2 * alpha - 1) * targets
    return weight * wrong**gamma * cross_entropy
