"""Transforms of `torch.func` and forward-mode differentiation: of every operator, as of the equations in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_support import tiny_variants
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import mf_kernels
from mf_kernels import reference
from mobileformer import Model
from mobileformer.measure.difference import lively_weights_

Function = Callable[..., Any]
TOLERANCE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """The model is a small one."""
    with tiny_variants():
        yield


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_parameters() -> list[Tensor]:
    d, c, k = 16, 4, 4
    shapes = [(c, d), (d, c), (d,), (d, d), (d, d), (d,), (2 * d, d), (d, 2 * d), (d,), (c, d), (c, d)]
    shapes += [(d // 4, d), (2 * k, d // 4)]
    made = []
    for index, shape in enumerate(shapes):
        made += [random(*shape, seed=50 + index) / 3, random(shape[0], seed=90 + index) / 3]
    return made


TOKENS = random(1, 2, 4, seed=1)
THETA = random(1, 8, seed=2) * 3
VECTORS = [random(4, seed=3), random(4, seed=4), random(4, seed=5), random(4, seed=6).square() + 0.5]
THETAS, ALPHA = random(1, 2, 8, seed=10) * 3, random(1, 2, 3, 4, seed=11).softmax(1)
X = random(1, 4, 3, 4, seed=7)


def fold(ops: Any, w: Tensor, *v: Tensor) -> Tensor:
    if ops is reference:
        scale = v[0] / torch.sqrt(v[3] + 1e-5)
        return torch.cat([(w * scale[:, None, None, None]).flatten(), v[1] - v[2] * scale])
    weight, bias = ops.fold_batch_norm(w, *v, 1e-5)
    return torch.cat([weight.flatten(), bias])


def joined_relu(ops: Any, x: Tensor, weight: Tensor, theta: Tensor) -> Tensor:
    if ops is reference:
        return reference.dynamic_relu(reference.depthwise_conv2d(x, weight, activation="identity"), theta)
    return ops.depthwise_dynamic_relu(x, weight, None, theta)


def tokens_alone(ops: Any, tokens: Tensor, gathered: Tensor, *parameters: Tensor) -> Tensor:
    if ops is not reference:
        return torch.cat([t.flatten() for t in ops.token_side(tokens, gathered, parameters, num_heads=1)])
    (gate, bridge, ln1, query, mix, ln2, expand, contract, ln3, key, value, reduce, widen) = zip(
        parameters[::2], parameters[1::2], strict=True
    )
    width = tokens.shape[-1:]
    t = F.layer_norm(
        tokens + F.linear(gathered * 2 * ((F.linear(tokens, *gate) + 3).clamp(0, 6) / 6), *bridge), width, *ln1
    )
    attended = reference.mobile_to_former(t.transpose(1, 2)[:, :, None], F.linear(t, *query), num_heads=1)
    t = F.layer_norm(t + F.linear(attended, *mix), width, *ln2)
    t = F.layer_norm(t + F.linear(F.gelu(F.linear(t, *expand)), *contract), width, *ln3)
    slopes = F.linear(F.relu(F.linear(t[:, 0], *reduce)), *widen)
    return torch.cat([o.flatten() for o in (t, F.linear(t, *key), F.linear(t, *value), slopes)])


def normalized(ops: Any, x: Tensor, weight: Tensor, bias: Tensor, theta: Tensor) -> Tensor:
    # inside a transform, statistics that are written to must be the function's own
    if ops is not reference:
        mean, variance = x[0, :, 0, 0].detach() * 0, x[0, :, 0, 0].detach() * 0 + 1
        return ops.batch_norm_activation(x, weight, bias, mean, variance, theta=theta)
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return reference.dynamic_relu(y, theta)


def in_place(name: str) -> Function:
    """The form that may write over x, given an x that nobody needs."""

    def call(ops: Any, x: Tensor, *others: Tensor) -> Tensor:
        return getattr(ops, name.removesuffix("_") if ops is reference else name)(x * 1, *others)

    return call


def by_name(name: str, **options: Any) -> Function:
    return lambda ops, *inputs: getattr(ops, name)(*inputs, **options)


WEIGHT = random(4, 1, 3, 3, seed=8)
CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "mobile_to_former": (by_name("mobile_to_former"), (X, TOKENS)),
    "former_to_mobile": (by_name("former_to_mobile"), (X, TOKENS, TOKENS + 1)),
    "former_to_mobile_": (in_place("former_to_mobile_"), (X, TOKENS, TOKENS + 1)),
    "dynamic_relu": (by_name("dynamic_relu"), (X, THETA)),
    "dynamic_relu_": (in_place("dynamic_relu_"), (X, THETA)),
    "spatial_dynamic_relu": (by_name("spatial_dynamic_relu"), (X, THETAS, ALPHA)),
    "spatial_dynamic_relu_": (in_place("spatial_dynamic_relu_"), (X, THETAS, ALPHA)),
    "depthwise_conv2d": (by_name("depthwise_conv2d"), (X, WEIGHT, VECTORS[0])),
    "depthwise_dynamic_relu": (joined_relu, (X, WEIGHT, THETA)),
    "fold_batch_norm": (fold, (WEIGHT, *VECTORS)),
    "token_side": (tokens_alone, (random(1, 2, 16, seed=9), TOKENS, *token_parameters())),
    "batch_norm_activation": (normalized, (X, VECTORS[0], VECTORS[1], THETA)),
}


def squares(f: Function) -> Function:
    return lambda *inputs: f(*inputs).square().sum()


def dual(f: Function, inputs: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        made = [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
        tangent = forward_ad.unpack_dual(f(*made)).tangent
    assert tangent is not None
    return tangent


def without_grad(
    take: Callable[[Function, tuple[Tensor, ...]], Tensor],
) -> Callable[[Function, tuple[Tensor, ...]], Tensor]:
    """Forward-mode differentiation goes on under `no_grad`, where the forms for inference serve."""

    def take_it(f: Function, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return take(f, inputs)

    return take_it


def tangent_of(f: Function, inputs: tuple[Tensor, ...]) -> Tensor:
    return jvp(f, inputs, tuple(torch.ones_like(t) for t in inputs))[1]


def stacked(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, t * 0.5, t * 1.5]) for t in inputs)


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Tensor]] = {
    "jvp": tangent_of,
    "jvp, no_grad": without_grad(tangent_of),
    "dual numbers": dual,
    "dual numbers, no_grad": without_grad(dual),
    "grad": lambda f, i: torch.cat([g.flatten() for g in grad(squares(f), tuple(range(len(i))))(*i)]),
    "jacrev": lambda f, i: jacrev(f, argnums=1)(*i),
    "jacfwd": lambda f, i: jacfwd(f, argnums=1)(*i),
    "hessian": lambda f, i: hessian(squares(f), argnums=1)(*i),
    "vmap": lambda f, i: vmap(f)(*stacked(i)),
    "vmap, no_grad": without_grad(lambda f, i: vmap(f)(*stacked(i))),
    "vmap over one": lambda f, i: vmap(f, in_dims=(0,) + (None,) * (len(i) - 1))(stacked(i)[0], *i[1:]),
    "vmap of grad": lambda f, i: vmap(grad(squares(f)))(*stacked(i)),
    "vmap of jvp": lambda f, i: vmap(lambda *j: tangent_of(f, j))(*stacked(i)),
}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


def of(name: str, ops: Any) -> Function:
    return lambda *inputs: CASES[name][0](ops, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_transformed_as_its_equations_are(name: str, transform: str, dtype: torch.dtype) -> None:
    inputs = CASES[name][1]
    want = TRANSFORMS[transform](of(name, reference), tuple(t.double() for t in inputs))
    got = TRANSFORMS[transform](of(name, mf_kernels), tuple(t.to(dtype) for t in inputs))
    assert want.abs().max() > 1e-3
    assert error(got, want) < (TOLERANCE if dtype == torch.float32 else 1e-12) * (10 if transform == "hessian" else 1)


@pytest.mark.parametrize("name", reference.__all__)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_was_asked_for_refuses_a_transform_by_name(name: str, backend: str) -> None:
    inputs = CASES[name][1]
    with (
        mf_kernels.use_backend(backend),
        pytest.raises(RuntimeError, match=rf"^{name}: backend '{backend}'.*torch\.func"),
    ):
        tangent_of(of(name, mf_kernels), inputs)
    with mf_kernels.use_backend("reference"):
        assert torch.equal(tangent_of(of(name, mf_kernels), inputs), tangent_of(of(name, reference), inputs))


@pytest.mark.parametrize("name", ["dynamic_relu", "mobile_to_former", "depthwise_dynamic_relu"])
def test_a_transform_inside_a_compiled_function_and_around_one(name: str) -> None:
    """The graph that was compiled outside of a transform must not serve inside of it."""
    inputs, f, want = CASES[name][1], squares(of(name, mf_kernels)), squares(of(name, reference))
    wide = tuple(t.double() for t in inputs)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def all_three(*i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad(f)(*i), tangent_of(f, i), f(*i)

    for got, wanted in zip(all_three(*inputs), (grad(want)(*wide), tangent_of(want, wide), want(*wide)), strict=True):
        assert error(got, wanted) < TOLERANCE
    compiled = torch.compile(f, backend="aot_eager")
    assert error(compiled(*inputs), want(*wide)) < TOLERANCE
    assert error(grad(compiled)(*inputs), grad(want)(*wide)) < TOLERANCE
    assert error(tangent_of(compiled, inputs), tangent_of(want, wide)) < TOLERANCE


def twins(training: bool, **options: Any) -> tuple[Model, Model]:
    """(the fused model, the plain one in float64), with the same weights."""
    fused = Model("tiny", num_classes=3, **options).train(training)
    lively_weights_(fused)
    plain = Model("tiny", num_classes=3, use_fused=False, **options).double().train(training)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def with_its_own_buffers(model: nn.Module) -> Function:
    """The model as a function: in training it writes to its buffers, which a transform forbids with captured ones."""

    def call(x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, buffers, (x,))

    return call


@pytest.mark.parametrize("kind", ["training", "evaluation", "to_inference"])
@pytest.mark.parametrize(
    "transform", ["jvp", "jvp, no_grad", "dual numbers", "grad", "vmap", "vmap, no_grad", "vmap of grad"]
)
def test_the_model_is_transformed_as_the_plain_one(kind: str, transform: str) -> None:
    fused, plain = twins(kind == "training")
    x = random(2, 3, 32, 48, seed=11)
    f = with_its_own_buffers(fused) if kind != "to_inference" else fused.to_inference()
    g = with_its_own_buffers(plain)
    if kind == "training" and "vmap" in transform:  # PyTorch refuses statistics written from a batch of calls
        with pytest.raises((RuntimeError, ValueError)) as of_plain:
            TRANSFORMS[transform](g, (x.double(),))
        with pytest.raises(of_plain.type):
            TRANSFORMS[transform](f, (x,))
        return
    want = TRANSFORMS[transform](g, (x.double(),))
    if kind == "training":  # statistics of a few values magnify what float32 rounds
        fused.double()
        assert error(TRANSFORMS[transform](f, (x.double(),)), want) < 1e-9
    else:
        assert error(TRANSFORMS[transform](f, (x,)), want) < 2e-4


def test_parameters_can_be_the_batch() -> None:
    """An ensemble in one call, and gradients by sample."""
    fused, plain = twins(False)
    x = random(2, 3, 32, 32, seed=12)
    others = copy.deepcopy(fused)
    lively_weights_(others)
    stack = {
        n: torch.stack([p.detach(), q.detach()])
        for (n, p), q in zip(fused.named_parameters(), others.parameters(), strict=True)
    }
    with torch.no_grad():
        got = vmap(lambda parameters: functional_call(fused, parameters, (x,)))(stack)
        assert error(got, torch.stack([fused(x), others(x)]).double()) < 2e-5

    def loss(parameters: dict[str, Tensor], model: Model, sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    results = []
    for model, inputs in ((fused.double(), x.double()), (plain, x.double())):
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        results.append(vmap(grad(loss), in_dims=(None, None, 0))(parameters, model, inputs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
