"""`torch.onnx.export` of a fused model, without this package's own export: plain operators, and the model's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_support import add_tiny

from mf_kernels import record_kernels

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


@pytest.mark.filterwarnings("ignore")  # of the exporters themselves
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_fused_model_is_exported_by_torch_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamo: bool
) -> None:
    model = add_tiny(monkeypatch)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    with torch.no_grad(), record_kernels() as record:
        torch.onnx.export(model, (x,), str(path), dynamo=dynamo)
    assert not [kernel for kernel in record.counts if ":native" in kernel]
    domains = {node.domain for node in onnx.load(str(path)).graph.node}
    assert domains <= {"", "ai.onnx"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad(), record_kernels() as record:
        expected = model(x)
    assert any(":native" in kernel for kernel in record.counts)  # served by kernels again
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)
