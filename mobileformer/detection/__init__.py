"""Detectors on the backbone: RetinaNet, and an end-to-end one with a Former in its head."""
