"""Fresh processes: what an import loads, and what is left without a library that loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_support import OPS, in_forks, python, runnable

import mf_kernels
import mobileformer
from mf_kernels import _native

LOADED = """
import json, sys
def loaded():
    libraries = [line for line in open("/proc/self/maps") if "mf_kernels/_c" in line or "_engine" in line]
    optional = ("triton", "mobileformer", "timm", "torchvision", "huggingface_hub")
    return {"libraries": len(libraries) > 0, "modules": [m for m in optional if m in sys.modules]}
seen = []
"""

# Every operator forward and backward: which kernels ran, what was said, whether the reference agrees bit by bit.
CALLS = """
import json, warnings
import torch
import mf_kernels
from mf_kernels import reference, testing

torch.set_num_threads(1)
cases = [next(c for c in testing.CASES if c.op == op and not c.layer_of) for op in OPS]
with warnings.catch_warnings(record=True) as caught, mf_kernels.record_kernels() as record:
    warnings.simplefilter("always")
    results = [
        testing.evaluate(case.function(mf_kernels), case.inputs(torch.float32), case.d_output(torch.float32))
        for case in cases for _ in range(2)
    ]
expected = [
    testing.evaluate(case.function(reference), case.inputs(torch.float32), case.d_output(torch.float32))
    for case in cases for _ in range(2)
]
print(json.dumps({
    "counts": record.counts,
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
    "equal": all(torch.equal(a[name], e[name]) for a, e in zip(results, expected) for name in e),
    "reasons": [row["reason"] for row in mf_kernels.status() if row["device"] + row["backend"] == "cpunative"],
}))
""".replace("in OPS", f"in {OPS}")

# A training step and an evaluation without fusion, then the same with it.
MODEL = """
import json, sys, warnings
import torch
import mf_kernels, mobileformer

torch.set_num_threads(1)
x = torch.zeros(2, 3, 64, 64)
seen = []
for fused in (False, True):
    with warnings.catch_warnings(record=True) as caught, mf_kernels.record_kernels() as record:
        warnings.simplefilter("always")
        model = mobileformer.Model("26m", use_fused=fused)
        model(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    seen.append({
        "counts": record.counts,
        "warnings": [str(w.message) for w in caught],
        "mapped": any("mf_kernels/_c" in line for line in open("/proc/self/maps")),
    })
print(json.dumps(seen))
"""

UNTOUCHED = {"counts": {}, "warnings": [], "mapped": False}


def report(code: str, *arguments: str, package: Path | None = None, **environment: str) -> dict:
    done = python(code, *arguments, package=package, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_import_loads_no_library_and_nothing_optional() -> None:
    code = """
import mf_kernels, mf_kernels.testing
seen.append(loaded())
import torch
mf_kernels.reference.dynamic_relu(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4))
with mf_kernels.use_backend("reference"), mf_kernels.record_kernels() as record:
    mf_kernels.dynamic_relu(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4))
assert record.counts == {"dynamic_relu:reference": 1}
seen.append(loaded())
mf_kernels.dynamic_relu(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4))
seen.append(loaded())
import mobileformer
seen.append(loaded())
print(json.dumps(seen))
"""
    before, reference, after, model = report(LOADED + code)
    assert before == reference == {"libraries": False, "modules": []}
    assert after == {"libraries": True, "modules": []}
    assert model == {"libraries": True, "modules": ["mobileformer"]}


def test_the_model_loads_the_library_with_fusion_only() -> None:
    plain, fused = report(MODEL)
    assert plain == UNTOUCHED
    assert fused["mapped"]
    assert fused["warnings"] == []
    assert not any("reference" in kernel for kernel in fused["counts"])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return copied(tmp_path / "package")


def copied(folder: Path) -> Path:
    """A folder that holds a copy of the kernels, for the tests to break, and the model beside it."""
    source = Path(mf_kernels.__file__).parent
    shutil.copytree(source, folder / "mf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mobileformer").symlink_to(Path(mobileformer.__file__).parent)
    return folder


def delete(library: Path) -> None:
    library.unlink()


def delete_with_record(library: Path) -> None:
    library.unlink()
    library.with_name("_build.json").unlink()


def leave_unbuilt(library: Path) -> None:
    library.unlink()
    record = {"libraries": {"mf_kernels._cpu": {"built": False, "reason": "no C++ compiler found"}}}
    library.with_name("_build.json").write_text(json.dumps(record))


def fill_with_text(library: Path) -> None:
    library.write_text("not a library\n")


def empty(library: Path) -> None:
    library.write_bytes(b"")


def ask_for_another_torch(library: Path) -> None:
    """The library of a torch that has a function which this one lacks."""
    content = library.read_bytes()
    assert b"aoti_torch_empty_strided\0" in content
    library.write_bytes(content.replace(b"aoti_torch_empty_strided\0", b"aoti_torch_empty_of_3000\0"))


def put_another_library(library: Path) -> None:
    """A real one, of somebody else."""
    import _ctypes

    library.write_bytes(Path(_ctypes.__file__).read_bytes())


def put_an_older_one(library: Path) -> None:
    """Ours, with other schemas: to call it would take the wrong number of arguments off the dispatcher's stack."""
    content = library.read_bytes()
    now = f"mf_kernels _cpu interface {_native.INTERFACE}.".encode()
    assert content.count(now) == 1
    library.write_bytes(content.replace(now, now.replace(b"interface", b"interfa0e")))


def lose_with_an_empty_record(library: Path) -> None:
    library.unlink()
    library.with_name("_build.json").write_bytes(b"")


def lose_with_a_damaged_record(library: Path) -> None:
    library.unlink()
    library.with_name("_build.json").write_text('{"libraries": [1, 2]}')


BROKEN = [
    (delete, "_cpu.so was built and is no longer there"),
    (delete_with_record, "_cpu.so was not built (no build record)"),
    (leave_unbuilt, "_cpu.so was not built (no C++ compiler found)"),
    (fill_with_text, "_cpu.so does not load: it is not the library of this version of the package; build it anew with"),
    (empty, "_cpu.so does not load: it is not the library of this version of the package; build it anew with"),
    (put_another_library, "_cpu.so does not load: it is not the library of this version of the package; build it anew"),
    (put_an_older_one, "_cpu.so does not load: it is not the library of this version of the package; build it anew"),
    (lose_with_an_empty_record, "_cpu.so was not built (no build record)"),
    (lose_with_a_damaged_record, "_cpu.so was not built (no build record)"),
    (ask_for_another_torch, "undefined symbol: aoti_torch_empty_of_3000"),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_why_a_library_is_not_there(
    damage: Callable[[Path], None], reason: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "FOLDER", package / "mf_kernels")
    monkeypatch.setattr(_native, "build_record", _native.build_record.__wrapped__)
    monkeypatch.setattr(_native, "_loaded", set())
    damage(package / "mf_kernels" / "_cpu.so")
    assert reason in _native.load.__wrapped__("cpu")
    assert _native.cpu_calls() == {}


def test_without_a_library_the_reference_serves_with_one_warning(tmp_path: Path) -> None:
    """And with one, nothing is said: the copy itself works, it is the damage that is seen."""
    damages = [delete, ask_for_another_torch, fill_with_text, put_another_library, lose_with_an_empty_record]
    packages = [copied(tmp_path / damage.__name__) for damage in damages]
    for damage, package in zip(damages, packages, strict=True):
        damage(package / "mf_kernels" / "_cpu.so")
    *broken, whole = map(json.loads, in_forks(CALLS, [*packages, copied(tmp_path / "whole")]))
    for damage, seen in zip(damages, broken, strict=True):
        assert seen["equal"]
        assert seen["counts"] == {f"{op}:reference": 2 for op in OPS}
        (warning,) = seen["warnings"]
        assert warning.startswith("KernelFallbackWarning: mobile_to_former: ")
        assert all(dict(BROKEN)[damage] in told for told in (warning, *seen["reasons"]))
    seen = whole
    assert seen["warnings"] == []
    assert seen["reasons"] == [None] * len(OPS)
    isa = _native.cpu_report()["isa"]
    kernels = [f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")]
    assert seen["counts"] == {f"{kernel}:native:cpu:{isa}": 2 for kernel in kernels}


def test_without_a_library_the_model_runs(package: Path) -> None:
    delete(package / "mf_kernels" / "_cpu.so")
    plain, fused = report(MODEL, package=package)
    assert plain == UNTOUCHED
    of_the_model = ("mobile_to_former", "former_to_mobile", "dynamic_relu", "depthwise_conv2d")
    assert set(fused["counts"]) == {f"{op}:reference" for op in of_the_model}
    assert len(fused["warnings"]) == 1


def test_without_a_library_explicit_and_strict_calls_fail_with_the_reason(package: Path) -> None:
    delete(package / "mf_kernels" / "_cpu.so")
    code = """
import os, torch, mf_kernels
from mf_kernels import _native
def call(): mf_kernels.dynamic_relu(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4))
def explicit():
    with mf_kernels.use_backend("native"): call()
def strict():
    os.environ["MF_KERNELS_STRICT"] = "1"
    call()
for failing in (explicit, strict, _native.cpu_report):
    try: failing()
    except RuntimeError as error: print(error)
"""
    done = python(code, package=package)
    assert done.stderr == ""
    assert done.stdout.count("_cpu.so was built and is no longer there") == 3


@pytest.mark.parametrize("asked", ["baseline", "avx2", "avx512", ""])
def test_instruction_set_of_the_environment(asked: str) -> None:
    if asked not in ("", *runnable()):
        pytest.skip(f"this CPU does not run {asked}")
    code = "import json, mf_kernels._native as n; print(json.dumps(n.cpu_report()))"
    seen = report(code, MF_KERNELS_ISA=asked)
    assert seen == seen | {"runnable": runnable(), "isa": asked or runnable()[-1], "calls": {}}


def test_an_unknown_instruction_set_in_the_environment_is_told() -> None:
    """The library does not serve: one warning names the variable, an explicit backend raises the same reason."""
    code = """
import torch, mf_kernels
x, theta = torch.ones(1, 2, 3, 3), torch.ones(1, 4)
mf_kernels.dynamic_relu(x, theta)
mf_kernels.dynamic_relu(x, theta)
with mf_kernels.use_backend("native"):
    try: mf_kernels.dynamic_relu(x, theta)
    except RuntimeError as error: print(error)
"""
    reason = f"MF_KERNELS_ISA: instruction set: expected one of {runnable()}, got 'sse9'"
    done = python(code, MF_KERNELS_ISA="sse9")
    assert done.stderr.count(reason) == 1
    assert reason in done.stdout
