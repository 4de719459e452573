"""The examples run and say what they promise. Speed is printed there, and not judged here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def mobilenetv3() -> ModuleType:
    """A copy of its own for each test, which may break it."""
    spec = importlib.util.spec_from_file_location("mobilenetv3", EXAMPLES / "mobilenetv3.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "count"), [("mobilenetv3_large_100", 9), ("mobilenetv3_small_050", 8)])
def test_mobilenetv3(name: str, count: int, mobilenetv3: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    mobilenetv3.main(["--model", name, "--size", "64", "--repeats", "1"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{name}: {count} depthwise")
    assert len(rows) == 6
    assert all(re.search(r"\d ms +\d+\.\d\dx  off by \de-\d\d ", row) for row in rows)
    assert ["depthwise_conv2d_fwd:native:cpu" in row for row in rows] == [False] * 4 + [True] * 2


def test_mobilenetv3_stops_where_the_logits_differ(mobilenetv3: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that is off by a thousandth."""
    forward = mobilenetv3.DepthwiseHardswish.forward
    monkeypatch.setattr(mobilenetv3.DepthwiseHardswish, "forward", lambda self, x: forward(self, x).mul_(1.001))
    with pytest.raises(AssertionError, match="and the kernel, contiguous: logits differ by"):
        mobilenetv3.main(["--model", "mobilenetv3_small_050", "--size", "64", "--repeats", "1"])


@pytest.mark.parametrize(
    ("served", "conv"),
    [
        (True, nn.Conv2d(4, 8, 3, padding=1, groups=4)),
        (True, nn.Conv2d(4, 4, 5, 2, padding=2, groups=4)),
        (False, nn.Conv2d(4, 4, 3, padding=1)),
        (False, nn.Conv2d(4, 4, 3, padding=0, groups=4)),
        (False, nn.Conv2d(4, 4, 7, padding=3, groups=4)),
        (False, nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)),
        (False, nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4)),
        (False, nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")),
    ],
)
def test_which_convolutions_are_replaced(served: bool, conv: nn.Conv2d, mobilenetv3: ModuleType) -> None:
    """In a network where the activation is the norm's, as in timm; the numbers stay."""
    norm = nn.BatchNorm2d(conv.out_channels)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    norm.add_module("act", nn.Hardswish())
    network = nn.Sequential(conv, norm).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        expected = norm.act(network(x))
        assert mobilenetv3.replace_(network) == int(served)
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
