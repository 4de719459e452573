"""What serves a copy for inference: the engine where it can, PyTorch where it is meant to, a warning in between."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_support import isas, needs_engine
from golden_support import recipe_image, recipe_model
from kernel_support import in_forks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mf_kernels
import mobileformer
from mobileformer import Model
from mobileformer.inference import Engine, InferenceModel, fold, library
from mobileformer.inference import model as inference_model
from mobileformer.inference.engine import NotFiniteError

pytestmark = needs_engine


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_model, "_warned", set())
    monkeypatch.delenv("MF_KERNELS_STRICT", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that served, one entry a call."""
    served: list[Engine] = []
    original = Engine.__call__

    def count(self: Engine, x: np.ndarray) -> np.ndarray:
        logits = original(self, x)
        served.append(self)
        return logits

    monkeypatch.setattr(Engine, "__call__", count)
    return served


@pytest.fixture(scope="module")
def model() -> Model:
    return recipe_model("26m", dtype=torch.float32)


def small_image(dtype: torch.dtype = torch.float32) -> Tensor:
    return recipe_image(2, 64, 64, seed=4, dtype=dtype)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_serves(spatial: bool, dtype: torch.dtype, calls: list[Engine]) -> None:
    """With the numbers of a folded file, in the dtype of the input, whatever the input's layout."""
    source = recipe_model("26m", spatial_dynamic_relu=spatial)
    copied = source.to_inference(dtype, threads=2)
    name = str(dtype).removeprefix("torch.")
    x = small_image()
    expected = Engine(fold(source), name, 2)(x.numpy())
    calls.clear()
    for given in (torch.float32, torch.float64):
        logits = copied(x.to(given))
        assert logits.dtype == given
        assert not logits.requires_grad
        np.testing.assert_array_equal(logits.numpy(), expected)
    spread = torch.zeros(2, 3, 64, 128)[..., ::2].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), spread, nn.Parameter(x, requires_grad=False)):
        np.testing.assert_array_equal(copied(other).numpy(), expected)
    with torch.inference_mode():
        np.testing.assert_array_equal(copied(x).numpy(), expected)
    with torch.no_grad():
        np.testing.assert_array_equal(copied(x.clone().requires_grad_()).numpy(), expected)
    assert len(calls) == 7
    assert {(e.dtype, e.threads, e.isa) for e in calls} == {(name, 2, isas()[-1])}


def test_threads_are_those_of_pytorch_where_none_are_given(model: Model, calls: list[Engine]) -> None:
    copied, before = model.to_inference(), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            copied(small_image())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [e.threads for e in calls] == [1, 2, 1]
    assert calls[0] is calls[2]


def in_float64(model: Model) -> Tensor:
    return model.to_inference(torch.float64)(small_image())


def unfused(model: Model) -> Tensor:
    plain = Model("26m", use_fused=False).eval()
    plain.load_state_dict(model.state_dict())
    return plain.to_inference()(small_image())


def with_a_gradient(model: Model) -> Tensor:
    x = small_image().requires_grad_()
    logits = model.to_inference()(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.abs().sum() > 0
    return logits.detach()


def with_a_hook(model: Model) -> Tensor:
    copied, seen = model.to_inference(), []
    handle = copied.network.blocks[3].register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    logits = copied(small_image())
    assert seen == [(2, 24, 8, 8)]
    handle.remove()
    assert copied.engine is not None
    return logits


def with_a_hook_before(model: Model) -> Tensor:
    """On a part that stays one when it is folded."""
    watched, seen = copy.deepcopy(model), []
    watched.blocks[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    logits = watched.to_inference()(small_image())
    assert seen == [(2, 12, 16, 16)]
    return logits


def compiled(model: Model) -> Tensor:
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(model.to_inference(threads=None), backend="eager", fullgraph=True)(small_image())


def traced(model: Model) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit tells what it makes of shapes
        return torch.jit.trace(model.to_inference(), small_image(), check_trace=False)(small_image())


def counted(model: Model) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        logits = model.to_inference()(small_image())
    assert counter.get_total_flops() > 1e6
    return logits


def in_another_dtype(model: Model) -> Tensor:
    copied = model.to_inference().double()
    assert copied.engine is None
    return copied(small_image(torch.float64)).float()


BY_DESIGN = [in_float64, unfused, with_a_gradient, with_a_hook, with_a_hook_before, compiled, traced, counted]
BY_DESIGN += [in_another_dtype]


@pytest.mark.parametrize("call", BY_DESIGN, ids=lambda call: call.__name__)
def test_pytorch_serves_where_it_is_meant_to(call: Callable, model: Model, calls: list[Engine]) -> None:
    """Without a word: a warning would be an error here."""
    with torch.no_grad():
        expected = model(small_image())
    logits = call(model)
    assert calls == []
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_goes_through_pytorch(value: float, model: Model, calls: list[Engine]) -> None:
    """And comes out as the model has it: NaN in its own sample, the other as it was."""
    x = small_image()
    x[0, 1, 30, 30] = value
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(model.to_inference()(x), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert calls == []
    assert issubclass(NotFiniteError, ValueError)


def test_what_is_no_image_is_refused_as_before(model: Model) -> None:
    copied = model.to_inference()
    for x, error, message in (
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "expected a floating-point dtype, got torch.uint8"),
        (torch.zeros(3, 64, 64), ValueError, r"x: expected 4 dimensions \(B, 3, H, W\), got shape \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"x: expected 3 channels, got 1 \(shape \(1, 1, 64, 64\)\)"),
        (torch.zeros(1, 3, 64, 31), ValueError, "x: expected height and width of at least 32, got 64 x 31"),
    ):
        with pytest.raises(error, match=message):
            copied(x)


# Where something is missing


class Adapter(nn.Linear):
    pass


def replace_a_part(model: Model) -> Model:
    part = model.blocks[1].former.project
    model.blocks[1].former.project = Adapter(part.in_features, part.out_features)
    model.blocks[1].former.project.load_state_dict(part.state_dict())
    return model


def break_a_weight(model: Model) -> Model:
    model.head.classifier.bias.data[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_a_part, r"blocks\.1\.former\.project is a Adapter"),
        (break_a_weight, r"not finite: head\.classifier\.bias"),
    ],
    ids=["adapter", "nan"],
)
def test_a_model_the_engine_cannot_have_is_told_once(
    change: Callable, reason: str, model: Model, calls: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = change(copy.deepcopy(model))
    with pytest.warns(mf_kernels.KernelFallbackWarning, match=reason) as caught:
        copied = changed.to_inference()
    assert caught[0].filename == __file__
    changed.to_inference()  # told already
    with torch.no_grad():
        expected = changed(small_image())
    torch.testing.assert_close(copied(small_image()), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert calls == []
    monkeypatch.setenv("MF_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"{reason}.*; MF_KERNELS_STRICT=1 makes this an error"):
        changed.to_inference()
    changed.to_inference(torch.float64)


def test_a_copy_that_was_written_to_is_not_the_engines_any_more(model: Model, calls: list[Engine]) -> None:
    copied = model.to_inference()
    copied(small_image())
    twin, loaded = copy.deepcopy(copied), model.to_inference()
    with torch.no_grad():
        twin.network.head.classifier.bias.add_(1)
    loaded.load_state_dict(twin.state_dict())
    for changed in (twin, loaded):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = changed(small_image())
            torch.testing.assert_close(copy.deepcopy(changed)(small_image()), logits)
            torch.testing.assert_close(changed.float()(small_image()), logits)
        torch.testing.assert_close(logits, copied(small_image()) + 1, rtol=1e-3, atol=1e-4)
        assert all("parameters of the copy were written to" in str(w.message) for w in caught)
    assert inference_model._warned == {"parameters of the copy were written to, and the engine has those of before"}
    assert len(calls) == 3


def test_copies_and_pickles_have_engines_of_their_own(model: Model, calls: list[Engine]) -> None:
    copied = model.to_inference(torch.bfloat16, threads=1)
    expected = copied(small_image())
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(copied),
        pickle.loads(pickle.dumps(copied)),
        torch.load(buffer, weights_only=False),
        copied.to("cpu").to(torch.bfloat16),
    ]
    for other in others:
        assert isinstance(other, InferenceModel)
        assert torch.equal(other(small_image()), expected)
    assert len(set(map(id, calls))) == 4  # the last one is the first
    assert len(calls) == 5


def test_a_copy_made_in_inference_mode(model: Model, calls: list[Engine]) -> None:
    with torch.inference_mode():
        copied = model.to_inference()
        made_inside = Model("26m").eval().to_inference()
        first = copied(small_image())
        made_inside(small_image())
    assert torch.equal(copied(small_image()), first)
    made_inside(small_image())
    assert len(calls) == 4


def copied(folder: Path) -> Path:
    """A folder with a copy of both packages' Python and build record, and no engine."""
    for name in ("mf_kernels", "mobileformer"):
        source = Path(mobileformer.__file__).parents[1] / name
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_engine*"))
    return folder


def record(package: Path, **row: object) -> None:
    (package / "mf_kernels" / "_build.json").write_text(json.dumps({"libraries": {"mobileformer._engine": row}}))


def leave_unbuilt(package: Path) -> None:
    record(package, built=False, reason="no C++ compiler found")


def forget(package: Path) -> None:
    (package / "mf_kernels" / "_build.json").unlink(missing_ok=True)


def lose(package: Path) -> None:
    record(package, built=True, reason=None)


def build_for_another_python(package: Path) -> None:
    (package / "mobileformer" / "_engine.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")


def break_library(package: Path) -> None:
    from importlib.machinery import EXTENSION_SUFFIXES

    (package / "mobileformer" / f"_engine{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")


MISSING = [
    (leave_unbuilt, "mobileformer._engine was not built (no C++ compiler found)"),
    (forget, "mobileformer._engine was not built (no build record)"),
    (lose, "mobileformer._engine was built and is no longer there"),
    (build_for_another_python, "mobileformer._engine was built for another Python (_engine.cpython-399-"),
    (break_library, "mobileformer._engine does not load: "),
]


WITHOUT = """
import sys  # an editable install finds the engine in its own tree, whatever package was imported
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import json, os, warnings
import torch
from mobileformer import Model
from mobileformer.inference import Engine, fold, library
torch.set_num_threads(1)
model, x = Model("26m", num_classes=2).eval(), torch.zeros(1, 3, 64, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same = torch.allclose(model.to_inference()(x), model.to_inference(torch.float64)(x), atol=1e-4)
    model.to_inference(torch.bfloat16)
errors = []
os.environ["MF_KERNELS_STRICT"] = "1"
for failing in (model.to_inference, lambda: Engine(fold(model)), lambda: Engine("no file")):
    try: failing()
    except RuntimeError as error: errors.append(str(error))
print(json.dumps({
    "same": same, "warnings": [f"{w.category.__name__}: {w.message}" for w in caught], "errors": errors,
    "status": library.status(),
}))
"""


def test_without_the_library_pytorch_serves_and_says_why(tmp_path: Path) -> None:
    packages = [copied(tmp_path / damage.__name__) for damage, _ in MISSING]
    for (damage, _), package in zip(MISSING, packages, strict=True):
        damage(package)
    for (_, reason), printed in zip(MISSING, in_forks(WITHOUT, packages), strict=True):
        seen = json.loads(printed)
        assert seen["same"]
        (warning,) = [w for w in seen["warnings"] if "to_inference" in w]
        assert warning.startswith("KernelFallbackWarning: to_inference: not the CPU engine but")
        assert len(seen["errors"]) == 3
        for told in (warning, *seen["errors"], seen["status"]["reason"]):
            assert reason in told
        assert seen["status"] == seen["status"] | {"available": False, "isa": None, "runnable": [], "compiled": []}


def test_an_unknown_instruction_set_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_ENGINE_ISA", "sse9")
    with pytest.warns(mf_kernels.KernelFallbackWarning, match=r"MF_ENGINE_ISA: expected an instruction set"):
        copied = model.to_inference()
    assert copied.engine is None
    monkeypatch.setenv("MF_ENGINE_ISA", isas()[0])
    engine = model.to_inference().engine
    assert engine is not None
    assert engine.isa == library.chosen_isa() == isas()[0]
