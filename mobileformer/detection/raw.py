"""A detector as a function of tensors alone, which is what exporters and other runtimes take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["RawPredictions"]


class RawPredictions(nn.Module):
    """A module whose call is a detector's `predict_raw`: x (B,in_chans,H,W) -> its raw predictions.

    `torch.onnx.export(RawPredictions(model.eval()), (x,), path, dynamo=True)` writes a detector without the choice
    among its predictions (thresholds and non-maximum suppression), which is left to whoever runs the file. It takes
    images of one size, which is that of `x`.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Any:
        return self.detector.predict_raw(x)
