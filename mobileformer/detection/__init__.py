"""Detectors on the backbone: RetinaNet, and an end-to-end one with a Former in its head."""

from mobileformer.detection.raw import RawPredictions as RawPredictions
from mobileformer.detection.retinanet import RetinaNet as RetinaNet

__all__ = ["RawPredictions", "RetinaNet"]
