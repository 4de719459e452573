"""A part is used unseen only while it is what it was built as: every kind of part, altered in every way it can be.

The fused ways are held against the plain model with the same alteration. Where that one raises, they have to as well.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from golden_support import recipe_image
from tiny_support import make, tiny_variants
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mobileformer import Model
from mobileformer.inference import model as inference_model
from mobileformer.measure.difference import lively_weights_
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.layers import DropPath, DynamicReLU, Former, FormerToMobile, MobileToFormer

Alteration = Callable[[nn.Module], object]
SIZE = 64


class Twice(nn.Module):
    """A parametrisation, and what a wrapper does."""

    def forward(self, value: Tensor) -> Tensor:
        return value * 1.25


class Scaled(Tensor):
    """A weight that computes by itself, as a quantised one does: twice what its numbers say, in a linear layer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, Scaled) else a for a in args]
        kwargs = {k: v.as_subclass(Tensor) if isinstance(v, Scaled) else v for k, v in (kwargs or {}).items()}
        if func is torch.nn.functional.linear and isinstance(args[1], Scaled):
            return func(*plain, **kwargs) * 1.5
        if func in (
            Tensor.__deepcopy__,
            Tensor.to,
            Tensor.double,
            Tensor.float,
            Tensor.detach,
            Tensor.clone,
            Tensor.requires_grad_,
        ):
            return func(*plain, **kwargs).as_subclass(Scaled)
        return func(*plain, **kwargs)


def scaled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value * 1.25
    return type(value)(map(scaled, value))


def wrapped_forward(module: nn.Module, *args: Any) -> Any:
    return scaled(type(module).forward(module, *args))


def wrap(module: nn.Module) -> None:
    """As wrappers that keep the module do it: the instance gets a `forward` of its own."""
    module.forward = functools.partial(wrapped_forward, module)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, out: scaled(out))


def hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, args, kwargs: ((scaled(args[0]), *args[1:]), kwargs), with_kwargs=True)


def subclass(module: nn.Module) -> None:
    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda self, *args: scaled(kind.forward(self, *args))})


def setting(name: str, value: Any) -> Alteration:
    def alter(module: nn.Module) -> None:
        setattr(module, name, value)

    alter.__name__ = f"{name}={value}"
    return alter


def bias(module: nn.Module) -> None:
    module.bias = nn.Parameter(torch.linspace(-0.5, 0.5, module.weight.shape[0], dtype=module.weight.dtype))


def without(name: str) -> Alteration:
    def alter(module: nn.Module) -> None:
        setattr(module, name, None)

    alter.__name__ = f"without {name}"
    return alter


def without_affine(module: nn.Module) -> None:
    module.weight = module.bias = None


def without_statistics(module: nn.Module) -> None:
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Twice(), unsafe=True)


def tensor_subclass(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled), requires_grad=False)


def in_training(module: nn.Module) -> None:
    module.train(not module.training)


def other_dtype(module: nn.Module) -> None:
    module.half()


ANY = [wrap, hook, hook_before, subclass]
WAYS: dict[type[nn.Module], list[Alteration]] = {
    nn.Conv2d: [
        bias,
        setting("stride", (1, 1)),
        setting("padding", (0, 0)),
        setting("padding", (2, 2)),
        setting("dilation", (2, 2)),
        setting("groups", 2),
        parametrized,
        other_dtype,
    ],
    nn.Linear: [without("bias"), parametrized, tensor_subclass, other_dtype],
    nn.LayerNorm: [without_affine, without("bias"), setting("eps", 0.5), parametrized, other_dtype],
    nn.BatchNorm2d: [
        without_affine,
        without_statistics,
        in_training,
        setting("eps", 0.5),
        setting("momentum", None),
        setting("track_running_stats", False),
        parametrized,
        other_dtype,
    ],
    nn.BatchNorm1d: [without_affine, without_statistics, in_training, setting("eps", 0.5), other_dtype],
    nn.Dropout: [],
    DropPath: [],
    ConvNorm: [setting("activation", "relu6"), setting("activation", "identity"), setting("shuffle", 2)],
    DynamicReLU: [],
    MobileToFormer: [],
    Former: [],
    FormerToMobile: [],
}


def roles(variant: str) -> dict[tuple[str, str], list[str]]:
    """(kind of block, path inside) -> paths: the parts that one line of code treats alike."""
    model = MODELS[variant][False]
    found: dict[tuple[str, str], list[str]] = {}
    for path, part in model.named_modules():
        if type(part) in WAYS or path.count(".") == 1:
            pieces = path.split(".")
            inside = pieces[0] == "blocks"
            kind = type(model.blocks[int(pieces[1])]).__name__ if inside else ""
            found.setdefault((kind, ".".join(pieces[2:] if inside else pieces)), []).append(path)
    return found


def cases(variant: str, seed: int) -> list[Any]:
    """Of every role one part, altered in the next of the ways of its kind; in two, where the ways are many."""
    chosen = random.Random(seed)
    listed: list[Any] = []
    waiting: dict[type, list[Alteration]] = {}
    for paths in roles(variant).values():
        path = chosen.choice(paths)
        kind = type(MODELS[variant][True].get_submodule(path))
        for _ in range(2 if kind in (nn.Conv2d, nn.BatchNorm2d) else 1):
            ways = waiting.setdefault(kind, [])
            if not ways:
                ways += [*WAYS.get(kind, []), *ANY]
            way = ways.pop(0)
            listed.append(pytest.param(variant, path, way, id=f"{variant}-{path}-{way.__name__}"))
    return listed


with tiny_variants():
    MODELS = {
        variant: {fused: make(variant, use_fused=fused).double() for fused in (False, True)}
        for variant in ("tiny", "tiny_ungrouped")
    }
CASES = [*cases("tiny_ungrouped", 2), *cases("tiny", 1)[::4]]


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inference_model, "_warned", set())
    monkeypatch.delenv("MF_KERNELS_STRICT", raising=False)
    with tiny_variants():
        yield


def altered(variant: str, fused: bool, path: str, way: Alteration, *, training: bool = False) -> Model:
    model = copy.deepcopy(MODELS[variant][fused]).train(training)
    way(model.get_submodule(path))
    return model


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__


def same(actual: Any, expected: Any, tolerance: float = 1e-8) -> None:
    """Both raise, or both give the same numbers."""
    if isinstance(expected, str) or isinstance(actual, str):
        assert type(expected) is type(actual), (actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def step(model: Model, x: Tensor) -> list[Tensor | None]:
    logits = model(x)
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(("variant", "path", "way"), CASES)
def test_an_altered_part_is_called(variant: str, path: str, way: Alteration) -> None:
    x = recipe_image(2, SIZE, SIZE, seed=4, dtype=torch.float64)
    plain, fused = (altered(variant, use_fused, path, way) for use_fused in (False, True))
    expected = outcome(lambda: plain(x).detach())
    with torch.no_grad():
        same(outcome(lambda: fused(x)), expected)
    if way is in_training or isinstance(expected, str):  # a copy for inference evaluates all of it, in one dtype
        return
    same(outcome(lambda: fused.to_inference(torch.float64)(x)), expected)
    same(outcome(lambda: plain.to_inference(torch.float64)(x)), expected)


@pytest.mark.parametrize(("variant", "path", "way"), CASES[::4])
def test_an_altered_part_is_called_by_the_engines_copy(variant: str, path: str, way: Alteration) -> None:
    """In float32, where the engine would serve: PyTorch does, with a warning that names the part, or in silence."""
    x = recipe_image(2, SIZE, SIZE, seed=4, dtype=torch.float32)
    model = altered(variant, True, path, way).float()
    expected = outcome(lambda: model(x).detach())
    if way is in_training or isinstance(expected, str):
        return
    same(outcome(lambda: model.to_inference()(x)), expected, 2e-3)


@pytest.mark.parametrize(("variant", "path", "way"), CASES[1::4])
def test_an_altered_part_is_called_in_training(variant: str, path: str, way: Alteration) -> None:
    x = recipe_image(3, SIZE, SIZE, seed=5, dtype=torch.float64)
    plain, fused = (outcome(lambda f=f: step(altered(variant, f, path, way, training=True), x)) for f in (False, True))
    same(fused, plain, 1e-6)


@pytest.mark.filterwarnings("ignore")  # of torchao's own import
def test_a_model_quantised_by_torchao_gives_the_plain_ones_numbers() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    fused, plain = (Model("26m", num_classes=7, use_fused=use_fused).eval() for use_fused in (True, False))
    lively_weights_(fused)
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(fused.head.classifier.weight) is not torch.nn.Parameter
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.to_inference()(x), expected, rtol=1e-4, atol=1e-4)
    assert fused.train()(x).isfinite().all()
