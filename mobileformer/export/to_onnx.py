"""ONNX, for ONNX Runtime, OpenVINO and whatever else reads it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobileformer.export.check import Runtime
from mobileformer.export.job import Job, quietly, require
from mobileformer.files.metadata import encode

__all__ = ["EDGE", "SMALLEST", "SUFFIX", "TAKES", "require_tools", "runtimes", "write"]

EDGE = False
SMALLEST = 32
SUFFIX = ".onnx"
TAKES = "any batch"

FORMAT = "mobileformer-onnx"
FORMAT_VERSION = 1


def require_tools(check: bool) -> None:
    """Both runtimes are needed: each is somebody's deployment, and one may misread what the other reads well."""
    require("export", "onnx", "onnxscript", *(("onnxruntime", "openvino") if check else ()))


def write(job: Job, path: Path) -> dict[str, Any]:
    """One file, weights inside. Its metadata are those of a weight file: variant, classes, labels, mean, std."""
    import onnx

    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            job.network,
            (job.example(),),
            dynamo=True,
            verbose=False,
            opset_version=job.opset,
            dynamic_shapes=job.dynamic_shapes(),
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    # Torch's notes on where everything came from: paths of this machine, and half of what the file says.
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, encode(job.metadata, form=FORMAT, version=FORMAT_VERSION))
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))
    return {"nodes": len(graph.node), "opset": job.opset}


def runtimes(path: Path) -> dict[str, Runtime]:
    """ONNX Runtime and OpenVINO, one thread, float32."""
    import onnxruntime
    import openvino

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )

    return {
        f"ONNX Runtime {onnxruntime.__version__}": lambda inputs: [
            np.asarray(session.run(None, {"images": x})[0]) for x in inputs
        ],
        f"OpenVINO {version('openvino')}": lambda inputs: [compiled([x])[0] for x in inputs],
    }
