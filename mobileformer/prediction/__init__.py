"""Images in, answers out: `Predictor` opens weights, chooses what computes, and answers in a stream.

`DetectionPredictor` does the same with a detector, whose answers are boxes.

Needs numpy and Pillow; and torch for anything but a file that is folded for the engine.
"""

from mobileformer.prediction.answers import Answer, AnswerFile, AnswerFileError, Ranked, run_key
from mobileformer.prediction.detector import DetectionPredictor
from mobileformer.prediction.found import Found, FoundBox
from mobileformer.prediction.network import DeviceError, EngineError, PrecisionError, is_folded
from mobileformer.prediction.predictor import Predictor
from mobileformer.prediction.view import InputView, Picture, input_view, pictures_in

__all__ = [
    "Answer",
    "AnswerFile",
    "AnswerFileError",
    "DetectionPredictor",
    "DeviceError",
    "EngineError",
    "Found",
    "FoundBox",
    "InputView",
    "Picture",
    "PrecisionError",
    "Predictor",
    "Ranked",
    "input_view",
    "is_folded",
    "pictures_in",
    "run_key",
]
