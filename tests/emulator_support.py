"""Builds the CUDA kernels for the host (tests/emulator) and calls them on CPU tensors.

Needs g++ and CUDA's headers, no GPU. What was compiled is kept in build/emulator under a hash of all that went in.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mf_kernels import testing

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "emulator"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
FLAGS += ["-fno-strict-aliasing", "-fPIC", "-pthread"]


def cuda_home() -> Path | None:
    """The toolkit's folder, or None where there is no nvcc; nvcc may be a script that calls the real one."""
    nvcc = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]


def missing() -> str:
    """Why the emulator cannot be built here, empty where it can."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_home() is None:
        return "no nvcc, whose headers the emulator needs"
    return ""


def build(name: str, sources: Sequence[str], *flags: str, link: Sequence[str] = ()) -> Path:
    """Compile tests/emulator/<source> for each source and link them to one file; only what has changed."""
    home = cuda_home()
    includes = ["-I", str(ROOT / "csrc"), "-I", str(SOURCES), "-include", str(SOURCES / "cuda_emulator.h")]
    for folder in ("include", "include/cccl"):
        includes += ["-isystem", str(home / folder)]
    read = [*ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/common/*.h"), *SOURCES.glob("*.h")]
    digest = hashlib.sha256(repr((flags, link, FLAGS, str(home))).encode())
    for path in sorted([*read, *(SOURCES / source for source in sources)]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    target = folder / name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        built = folder / f"{name}-{source}.o"
        run("g++", *FLAGS, *flags, *includes, "-c", str(SOURCES / source), "-o", str(built))
        return str(built)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    temporary = folder / f"{name}.{os.getpid()}"
    run("g++", *flags, *link, "-pthread", *objects, "-o", str(temporary))
    os.replace(temporary, target)
    return target


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"


@functools.cache
def library() -> ctypes.CDLL:
    """All kernels as C functions."""
    sources = [f"{op}.cpp" for op in _EVALUATE]
    return ctypes.CDLL(str(build("kernels.so", [*sources, "launched.cpp"], link=["-shared"])))


def call(function: str, *arguments: Tensor | int | bool | None) -> None:
    """Call a function of interface.h: the first tensor tells the dtype, integers are 64 bits wide."""
    converted: list = []
    for argument in arguments:
        if isinstance(argument, bool):
            converted.append(ctypes.c_bool(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        else:
            converted.append(ctypes.c_void_p(argument.data_ptr() if argument is not None else None))
    dtype = next(DTYPES[a.dtype] for a in arguments if isinstance(a, Tensor))
    getattr(library(), function)(ctypes.c_int(dtype), *converted)


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory in the layout of a tensor, NaN all over: what a kernel does not write stays visible."""
    return torch.full_like(like, float("nan"), dtype=dtype)


def evaluate(case: testing.Case, inputs: dict[str, Tensor], d_output: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """The output and every gradient, as `testing.evaluate` names them, and which CUDA kernels were launched.

    The map lies contiguous or channels_last, aligned or not; other strides become contiguous before a kernel sees them.
    """
    launched()  # forgets what ran before
    channels_last = is_channels_last(inputs["x"])
    if d_output.dim() == 4:  # as feature_map_as does for the map's gradient
        d_output = d_output.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    rest = {name: t.contiguous() for name, t in inputs.items() if name != "x"}
    results = _EVALUATE[case.op]({"x": inputs["x"], **rest}, d_output, case.options, channels_last)
    return results, launched()


def is_channels_last(x: Tensor) -> bool:
    """Whether a call on a card would go by positions: feature_map.h has the same rule."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def launched() -> list[str]:
    """Kernels that were launched since this was called last: depthwise_conv2d<float, channels, 4, 3, 1> and such."""
    buffer = ctypes.create_string_buffer(1 << 16)
    library().mf_launched(buffer, ctypes.c_int64(len(buffer)))
    return sorted(_kernel_name(name) for name in buffer.value.decode().split())


def kernels_of(case: testing.Case, dtype: torch.dtype, layout: str) -> set[str]:
    """Which kernels a row launches, without running them."""
    library().mf_only_tell(ctypes.c_bool(True))
    try:
        return set(evaluate(case, case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout))[1])
    finally:
        library().mf_only_tell(ctypes.c_bool(False))


@functools.cache
def _kernel_name(mangled: str) -> str:
    return cuda_resources().kernel_names([mangled])[mangled]


@functools.cache
def cuda_resources() -> ModuleType:
    """benchmarks/cuda_resources.py, which is no package's module: names and table of the kernels."""
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "benchmarks" / "cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _dynamic_relu(inputs: dict, d_y: Tensor, options: dict, channels_last: bool) -> dict[str, Tensor]:
    x, theta = inputs["x"], inputs["theta"]
    B, C, H, W = x.shape
    shape = (B, C, H * W, channels_last)
    y, d_x, d_theta = poisoned(x), poisoned(x), poisoned(theta)
    call("mf_dynamic_relu", y, x, theta, *shape)
    call("mf_dynamic_relu_backward", d_x, d_theta, d_y, x, theta, *shape)
    return {"output": y, "d_x": d_x, "d_theta": d_theta}


def _spatial_dynamic_relu(inputs: dict, d_y: Tensor, options: dict, channels_last: bool) -> dict[str, Tensor]:
    x, theta, alpha = inputs["x"], inputs["theta"], inputs["alpha"]
    B, C, H, W = x.shape
    shape = (B, C, H * W, theta.shape[1], channels_last)
    y, d_x, d_theta, d_alpha = poisoned(x), poisoned(x), poisoned(theta), poisoned(alpha)
    call("mf_spatial_dynamic_relu", y, x, theta, alpha, *shape)
    call("mf_spatial_dynamic_relu_backward", d_x, d_theta, d_alpha, d_y, x, theta, alpha, *shape)
    return {"output": y, "d_x": d_x, "d_theta": d_theta, "d_alpha": d_alpha}


def _former_to_mobile(inputs: dict, d_y: Tensor, options: dict, channels_last: bool) -> dict[str, Tensor]:
    x, k, v = inputs["x"], inputs["k"], inputs["v"]
    B, C, H, W = x.shape
    shape = (B, C, H * W, k.shape[1], options["num_heads"], channels_last)
    y, d_x, d_k, d_v = poisoned(x), poisoned(x), poisoned(k), poisoned(v)
    call("mf_former_to_mobile", y, x, k, v, *shape)
    call("mf_former_to_mobile_backward", d_x, d_k, d_v, d_y, x, k, v, *shape)
    return {"output": y, "d_x": d_x, "d_k": d_k, "d_v": d_v}


def _mobile_to_former(inputs: dict, d_out: Tensor, options: dict, channels_last: bool) -> dict[str, Tensor]:
    x, q, num_heads = inputs["x"], inputs["q"], options["num_heads"]
    B, C, H, W = x.shape
    shape = (B, C, H * W, q.shape[1], num_heads, channels_last)
    out, d_x, d_q = poisoned(q), poisoned(x), poisoned(q)
    log_sum_exp = torch.full((B, num_heads, q.shape[1]), float("nan"))
    call("mf_mobile_to_former", out, log_sum_exp, x, q, *shape)
    call("mf_mobile_to_former_backward", d_x, d_q, d_out, x, q, out, log_sum_exp, *shape)
    return {"output": out, "d_x": d_x, "d_q": d_q}


def _depthwise_conv2d(inputs: dict, d_y: Tensor, options: dict, channels_last: bool) -> dict[str, Tensor]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    B, C, H, W = x.shape
    activation = ("identity", "relu6", "hardswish").index(options["activation"])
    shape = (B, C, H, W, weight.shape[0], weight.shape[2], options["stride"], activation, channels_last)
    y, d_x, d_weight, d_bias = poisoned(d_y), poisoned(x), poisoned(weight), poisoned(weight[:, 0, 0, 0])
    call("mf_depthwise_conv2d", y, x, weight, bias, *shape)
    call("mf_depthwise_conv2d_backward", d_x, d_weight, d_bias, d_y, x, weight, bias, *shape)
    return {"output": y, "d_x": d_x, "d_weight": d_weight} | ({} if bias is None else {"d_bias": d_bias})


_EVALUATE = {
    "mobile_to_former": _mobile_to_former,
    "former_to_mobile": _former_to_mobile,
    "dynamic_relu": _dynamic_relu,
    "spatial_dynamic_relu": _spatial_dynamic_relu,
    "depthwise_conv2d": _depthwise_conv2d,
}
