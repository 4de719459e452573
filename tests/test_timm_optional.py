"""What is optional is not loaded before it is asked for, and told by name where it is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kernel_support import in_forks, python

OPTIONAL = ("timm", "torchvision", "huggingface_hub")


def test_nothing_optional_is_loaded_by_an_import() -> None:
    """Every name that the packages offer is touched, too."""
    code = f"""
import json, sys
import mobileformer, mobileformer.data, mobileformer.training, mobileformer.inference, mobileformer.export
for package in (mobileformer, mobileformer.data, mobileformer.training, mobileformer.inference):
    for name in package.__all__:
        getattr(package, name)
model = mobileformer.Model("26m")
model.to_inference()
print(json.dumps([name for name in {OPTIONAL} if name in sys.modules]))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_what_is_missing_is_told_with_the_way_to_get_it() -> None:
    rows = [("timm", "timm", "timm"), ("torchvision", "timm", "timm"), ("huggingface_hub", "hub", "hub")]
    codes = [WITHOUT.format(missing=missing, module=module) for missing, module, _ in rows]
    for (missing, _, extra), told in zip(rows, in_forks(codes, Path(__file__).parents[1]), strict=True):
        assert missing in told
        assert f"pip install 'mobileformer[{extra}]'" in told


WITHOUT = """
import sys
sys.modules[{missing!r}] = None
try:
    import mobileformer.{module}
except ImportError as error:
    print(error)
"""


GUARD = """
import torch
from mobileformer._torchvision import ensure_torchvision
torchvision = ensure_torchvision()
assert ensure_torchvision() is torchvision
"""


def test_torchvision_imports_and_is_the_one_that_timm_gets() -> None:
    """Also after somebody's own attempt, which leaves half of it behind where it fails."""
    code = f"""
try:
    import torchvision
except RuntimeError:
    pass
{GUARD}
import sys, timm
assert sys.modules["torchvision"] is torchvision
assert torchvision.transforms.functional.InterpolationMode.BILINEAR.value == "bilinear"
torch.ops.torchvision.nms
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_whole_torchvision_is_only_imported(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("", encoding="utf-8")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{GUARD}assert not hasattr(torch.ops.torchvision, 'nms')"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_another_trouble_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no such driver')", encoding="utf-8")
    done = python(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{GUARD}")
    assert "RuntimeError: no such driver" in done.stderr


TEXT = (Path(__file__).resolve().parents[1] / "docs/ecosystem.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
def test_the_code_of_the_page_runs(code: str, tmp_path: Path) -> None:
    done = python(f"import os, torch\nos.chdir({str(tmp_path)!r})\ntorch.set_num_threads(1)\n{code}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_the_page_names_the_versions_that_are_pinned() -> None:
    constraints = (Path(__file__).resolve().parents[1] / "requirements/constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\w+)==(\S+)$", constraints, re.MULTILINE))
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", TEXT, re.MULTILINE))
    assert pins["timm"] in rows["timm"]
    assert pins["torchvision"] in rows["timm"]
    assert pins["huggingface_hub"] in rows["hub"]
    assert f"torch=={pins['torch']} torchvision=={pins['torchvision']}" in TEXT
