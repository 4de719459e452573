"""What a kernel needs, found without a GPU: compile the launches of an operator for an architecture and read them.

launches = launches_of(case, torch.bfloat16, channels_last=True, batch=128, arch=90)
resources(launches[0], 90)  # {"registers": 85, "spilled_bytes": 0, "shared_bytes": 0, "loads": {...}, ...}
"""

from __future__ import annotations

import collections
import importlib
import inspect
import os
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mf_kernels.testing import Case
from mf_kernels.triton._launch import Launch, recording

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def launches_of(case: Case, dtype: torch.dtype, *, channels_last: bool, batch: int, arch: int) -> list[Launch]:
    """What forward and then backward of one row would launch, with its batch replaced."""
    module = importlib.import_module(f"mf_kernels.triton.{case.op}")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    arguments: dict[str, Any] = {}
    for name, shape in case.shapes.items():
        full = (batch, *shape[1:]) if name not in ("weight", "bias") else shape
        values = torch.empty(full, dtype=dtype, device="meta")
        arguments[name] = values.contiguous(memory_format=layout) if name == "x" else values
    names = list(inspect.signature(module.forward).parameters)
    tensors = [arguments.get(name) for name in names if name not in case.options]
    options = [case.options[name] for name in names if name in case.options]
    with recording((arch // 10, arch % 10)) as launches:
        made = module.forward(*tensors, *options)
        output, kept = (made[0], made) if isinstance(made, tuple) else (made, ())
        module.backward(output, *tensors, *kept, *options)
    return launches


def settings(call: Launch) -> dict[str, Any]:
    """The compile-time side of a launch."""
    limit = {} if call.max_registers is None else {"max_registers": call.max_registers}
    return {**call.constants, "num_warps": call.num_warps, "num_stages": call.num_stages, **limit}


def compile_launch(call: Launch, arch: int) -> Any:
    """The kernel compiled as a launch with these arguments on that architecture would compile it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(call.kernel.arg_names):
        value = call.constants[name] if name in call.constants else call.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # as torch allocates
        elif name in call.constants or value is None or value == 1:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options())


def resources(call: Launch, arch: int) -> dict[str, Any]:
    """Registers and spilled bytes of a thread, shared bytes of a program, bytes at once of its loads and stores."""
    compiled = compile_launch(call, arch)
    ptx = compiled.asm["ptx"]
    usage = _usage(compiled.asm["cubin"])
    loads = _widths(r"ld\.global[\w.:]*?((?:\.v\d)?\.b\d+) ", ptx)
    for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x\w+|\d+)", ptx):
        loads[int(width, 0)] += 1
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "loads": {str(width): count for width, count in sorted(loads.items(), reverse=True)},
        "stores": {
            str(width): count
            for width, count in sorted(_widths(r"st\.global[\w.:]*?((?:\.v\d)?\.b\d+) ", ptx).items(), reverse=True)
        },
    }


def _widths(pattern: str, ptx: str) -> collections.Counter[int]:
    counts: collections.Counter[int] = collections.Counter()
    for vector in re.findall(pattern, ptx):
        parts = vector.strip(".").split(".")
        counts[int(parts[0][1:]) * int(parts[1][1:]) // 8 if len(parts) == 2 else int(parts[0][1:]) // 8] += 1
    return counts


def _usage(cubin: bytes) -> dict[str, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(told_of) for name, told_of in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
