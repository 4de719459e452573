"""The number by which a library of another version is known grows with the schemas that it fills."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

import mf_kernels
from mf_kernels import _native
from mobileformer.inference import library

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {1: "d960685b7372d45d"}  # interface -> digest of all schemas


def schemas() -> list[str]:
    assert mf_kernels.__all__
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mf_kernels::"))
    parts = [re.split(r"::|\.", name)[1:] for name in names]
    return [str(getattr(getattr(torch.ops.mf_kernels, op), overload)._schema) for op, overload in parts]


def test_a_changed_schema_raises_the_interface() -> None:
    digest = hashlib.sha256("\n".join(schemas()).encode()).hexdigest()[:16]
    assert SCHEMAS.get(_native.INTERFACE) == digest, (
        f"raise MF_INTERFACE in csrc/common/interface.h and INTERFACE in mf_kernels/_native.py and "
        f"mobileformer/inference/library.py, and put {digest} here beside the new number"
    )


def test_the_number_is_one_everywhere() -> None:
    (told,) = re.findall(r"#define MF_INTERFACE (\d+)", (ROOT / "csrc" / "common" / "interface.h").read_text())
    assert int(told) == _native.INTERFACE == library.INTERFACE
