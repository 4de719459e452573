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
INTERFACE = 1
# Of each operator of that interface a digest of its schema. A new one is a line here and needs no new number: a library
# from before it has no kernel of it, which `_native.missing` finds.
SCHEMAS = {
    "batch_norm_activation_bwd": "2d08d6d2",
    "batch_norm_activation_fwd": "f8834cf9",
    "depthwise_conv2d_bwd": "fbd0be4f",
    "depthwise_conv2d_fwd": "555f9c57",
    "depthwise_dynamic_relu": "aaf51437",
    "dynamic_relu_": "5ccbdfe8",
    "dynamic_relu_bwd": "61971f88",
    "dynamic_relu_fwd": "935437a7",
    "fold_batch_norm": "e3e2e88e",
    "former_to_mobile_": "526764cf",
    "former_to_mobile_bwd": "6d762980",
    "former_to_mobile_fwd": "7bef6c1e",
    "mobile_to_former_bwd": "37a77971",
    "mobile_to_former_fwd": "8a0d82b1",
    "spatial_dynamic_relu_": "12f9d93d",
    "spatial_dynamic_relu_bwd": "0a7e74e9",
    "spatial_dynamic_relu_fwd": "13918aaf",
    "token_side": "5fae5ac4",
}


def schemas() -> dict[str, str]:
    """The digest of every operator's schema, which is the same for both of its overloads."""
    assert mf_kernels.__all__
    found: dict[str, set[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("mf_kernels::"):
            op, overload = re.split(r"::|\.", name)[1:]
            schema = str(getattr(getattr(torch.ops.mf_kernels, op), overload)._schema)
            found.setdefault(op, set()).add(schema.replace(f"{op}.{overload}", op))
    return {op: hashlib.sha256(schema.encode()).hexdigest()[:8] for op, (schema,) in sorted(found.items())}


def test_a_changed_schema_raises_the_interface() -> None:
    found = schemas()
    changed = sorted(op for op in found.keys() | SCHEMAS.keys() if found.get(op) != SCHEMAS.get(op))
    assert _native.INTERFACE == INTERFACE
    assert not changed, (
        f"put { ({op: found.get(op) for op in changed}) } into SCHEMAS; where one is not new, also raise INTERFACE "
        f"here, in mf_kernels/_native.py and in mobileformer/inference/library.py, and MF_INTERFACE in "
        f"csrc/common/interface.h"
    )


def test_the_number_is_one_everywhere() -> None:
    (told,) = re.findall(r"#define MF_INTERFACE (\d+)", (ROOT / "csrc" / "common" / "interface.h").read_text())
    assert int(told) == _native.INTERFACE == library.INTERFACE
