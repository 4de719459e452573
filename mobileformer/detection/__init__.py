"""Detectors on the backbone: RetinaNet, and an end-to-end one with a Former in its head."""

from mobileformer.detection.end_to_end import EndToEnd as EndToEnd
from mobileformer.detection.raw import RawPredictions as RawPredictions

__all__ = ["EndToEnd", "RawPredictions"]
