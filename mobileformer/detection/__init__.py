"""Detectors on the backbone: RetinaNet, and an end-to-end one with a Former in its head."""

from mobileformer.detection.end_to_end import EndToEnd as EndToEnd
from mobileformer.detection.raw import RawPredictions as RawPredictions
from mobileformer.detection.retinanet import RetinaNet as RetinaNet

__all__ = ["DETECTORS", "EndToEnd", "RawPredictions", "RetinaNet"]

# By the name that recipes, commands and files have for each
DETECTORS = {"retinanet": RetinaNet, "end-to-end": EndToEnd}
