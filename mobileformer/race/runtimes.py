"""Other runtimes as plain functions on numpy arrays, with the settings that make each fastest for one call at a time.

Measured on one thread, minima of turns: shapes made static are 20 % faster than free ones in OpenVINO for the larger
networks and 35 % for the smaller ones, and the same in ONNX Runtime; thread pinning, performance hints, denormals set
to zero, the memory arena and bound outputs are all within what two runs differ by.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

__all__ = ["Function", "onnxruntime_session", "openvino_model", "versions"]

Function = Callable[[np.ndarray], np.ndarray]


def onnxruntime_session(path: Path, shape: tuple[int, ...], *, threads: int = 1) -> Function:
    """The only input, of this shape, float32 -> the first output."""
    import onnx
    import onnxruntime

    (image,) = onnx.load(path, load_external_data=False).graph.input
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    # its threads would otherwise spin on while another contender takes its turn on the same processors
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for dimension, size in zip(image.type.tensor_type.shape.dim, shape, strict=True):
        if dimension.dim_param:
            options.add_free_dimension_override_by_name(dimension.dim_param, size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {image.name: x})[0])

    return run


def openvino_model(
    path: Path, shape: tuple[int, ...], *, threads: int = 1, precision: Literal["f32", "bf16"] = "f32"
) -> Function:
    """The only input, of this shape, float32 -> the first output, which the next call writes over.

    Left to itself OpenVINO computes in bfloat16 wherever the processor can, so the precision is always said, and read
    back. Raises RuntimeError where this processor has no bfloat16, or the setting did not hold.
    """
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("precision: bf16 needs a processor with bfloat16 instructions")
    model = core.read_model(path)
    model.reshape(list(shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # other contenders take their turns on the same processor
    }
    compiled = core.compile_model(model, "CPU", settings)
    held = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if held != {"f32": "f32", "bf16": "bf16"}[precision]:
        raise RuntimeError(f"precision: asked for {precision}, OpenVINO took {held}")
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        return request.infer([x], share_inputs=True, share_outputs=True)[0]

    return run


def versions() -> dict[str, str]:
    """For the environment of a result file."""
    return {name: version(name) for name in ("onnx", "onnxruntime", "openvino")}
