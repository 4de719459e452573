"""Inside torch.compile and torch.export: one graph, the same numbers, and the native kernels in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from kernel_support import OPS, native
from operator_rows import SMALL
from torch import Tensor, nn

import mf_kernels
from mf_kernels import KernelFallbackWarning, _native, record_kernels, testing, use_backend


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    """Neither in memory nor on disk, where it would outlive a change of the operators."""
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def overload(op: str, direction: str) -> Callable[..., object]:
    _native.load("cpu")
    return getattr(torch.ops.mf_kernels, f"{op}_{direction}").native


def forward_arguments(op: str, layout: str) -> tuple:
    inputs = SMALL[op].inputs(torch.float32, layout=layout)
    return (*inputs.values(), *SMALL[op].options.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, layout: str) -> None:
    """Schema, fake kernel against real one, dispatch under AOT: forward and backward, by torch's own tests."""
    arguments = forward_arguments(op, layout)
    torch.library.opcheck(overload(op, "fwd"), arguments)
    saved = ()
    if op == "mobile_to_former":  # its backward takes the results of its forward too
        saved = overload(op, "fwd")(*arguments)
    inputs, options = arguments[: len(SMALL[op].shapes)], arguments[len(SMALL[op].shapes) :]
    d_output = SMALL[op].d_output(torch.float32, layout=layout)
    torch.library.opcheck(overload(op, "bwd"), (d_output, *inputs, *saved, *options))


@pytest.mark.parametrize("case", testing.CASES[::7], ids=lambda case: case.id)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_fake_results_lie_as_the_real_ones(case: testing.Case, layout: str) -> None:
    """Shapes, dtypes and strides of outputs and gradients: what a compiler plans with is what it gets."""
    inputs, d_output = case.inputs(torch.bfloat16, layout=layout), case.d_output(torch.bfloat16)
    real = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in inputs.items()}
        fake = testing.evaluate(case.function(mf_kernels), fakes, mode.from_tensor(d_output))
    for name, t in real.items():
        assert (fake[name].shape, fake[name].dtype, fake[name].stride()) == (t.shape, t.dtype, t.stride())


@contextlib.contextmanager
def one_graph_for_all() -> Iterator[None]:
    """A second graph is an error, and sizes that are equal by chance are not taken to be equal always."""
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        yield


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_one_graph_with_gradients(op: str, dynamic: bool) -> None:
    """The native kernels run, forward and backward, in a graph of its own or one for every batch and size."""
    case = SMALL[op]
    compiled = torch.compile(case.function(mf_kernels), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    shapes = [case.shapes]
    if dynamic:
        shapes += [{n: (2 * s[0] if n not in ("weight", "bias") else s[0], *s[1:]) for n, s in case.shapes.items()}]
    for sizes in shapes:
        row = testing.Case(op, case.name, sizes, case.reaches, case.options)
        inputs, d_output = row.inputs(torch.float32), row.d_output(torch.float32)
        with record_kernels() as record, one_graph_for_all():
            actual = testing.evaluate(compiled, inputs, d_output)
        assert record.counts == native(f"{op}_fwd", f"{op}_bwd", isa=_native.cpu_report()["isa"])
        expected = testing.evaluate(row.function(mf_kernels), inputs, d_output)
        assert all(torch.equal(t, expected[name]) for name, t in actual.items())


class Block(nn.Module):
    """All five operators between arithmetic that a compiler would like to fuse."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Parameter(torch.randn(3, channels))
        self.weight = nn.Parameter(torch.randn(2 * channels, 1, 3, 3))
        self.theta = nn.Linear(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        tokens = tokens + mf_kernels.mobile_to_former(x * 2, tokens)
        x = mf_kernels.former_to_mobile(x + 1, tokens, tokens.tanh())
        y = mf_kernels.depthwise_conv2d(x, self.weight, stride=2)
        y = mf_kernels.spatial_dynamic_relu(y - 0.5, self.theta(tokens), y[:, :3].softmax(1))
        return mf_kernels.dynamic_relu(y + 0.5, self.theta(tokens[:, 0])).sigmoid()


def gradients(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))]


@pytest.mark.parametrize(
    ("dynamic", "layout", "batches"),
    [(False, torch.channels_last, (2,)), (True, torch.contiguous_format, (2, 3))],
    ids=["static", "dynamic"],
)
def test_inductor(dynamic: bool, layout: torch.memory_format, batches: tuple[int, ...]) -> None:
    """The default compiler, which plans memory and strides by the fake kernels; one graph for any batch if dynamic."""
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    kernels = [f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")]
    for number, batch in enumerate(batches):
        x = torch.randn(batch, 12, 9, 7).to(memory_format=layout)
        with record_kernels() as record, torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            actual = gradients(block, compiled, x)
        assert record.counts == native(*kernels, isa=_native.cpu_report()["isa"])
        for a, e in zip(actual, gradients(block, block, x), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_a_change_of_the_backend_reaches_a_compiled_function() -> None:
    """A graph holds the backend that it was traced with; another choice traces it again, the first one comes back."""
    case = SMALL["dynamic_relu"]
    compiled = torch.compile(case.function(mf_kernels), fullgraph=True, backend="aot_eager")
    served = native("dynamic_relu_fwd", isa=_native.cpu_report()["isa"])
    for backend, counts in (("auto", served), ("reference", {}), ("native", served), ("auto", served)):
        with use_backend(backend), record_kernels() as record:
            compiled(**case.inputs(torch.float32))
        assert record.counts == counts, backend


def test_a_fallback_inside_a_graph_warns_too(unwarned: None) -> None:
    case = SMALL["dynamic_relu"]
    compiled = torch.compile(case.function(mf_kernels), fullgraph=True, backend="aot_eager")
    inputs = case.inputs(torch.float16)
    with pytest.warns(KernelFallbackWarning, match=r"dynamic_relu: .*torch.float16"):
        y = compiled(**inputs)
    with use_backend("reference"):
        assert torch.equal(y, case.function(mf_kernels)(**inputs))


def test_autocast_inside_a_graph() -> None:
    case = SMALL["former_to_mobile"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.function(mf_kernels)(**inputs)

    inputs, d_output = case.inputs(torch.float32), case.d_output(torch.bfloat16)
    results = testing.evaluate(compiled, inputs, d_output)
    assert [t.dtype for t in results.values()] == [torch.bfloat16] + 3 * [torch.float32]


class Call(nn.Module):
    def __init__(self, case: testing.Case) -> None:
        super().__init__()
        self.function = case.function(mf_kernels)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("op", OPS)
def test_export_with_a_dynamic_batch(op: str) -> None:
    """One node of ours in the graph, which then runs for batches it has not seen, with the native kernel."""
    case = SMALL[op]
    batch = torch.export.Dim("batch", max=64)
    shapes = tuple({} if name in ("weight", "bias") else {0: batch} for name in case.shapes)
    example = tuple(case.inputs(torch.float32).values())
    program = torch.export.export(Call(case), example, dynamic_shapes=(shapes,), strict=True)
    nodes = [node.target for node in program.graph.nodes if "mf_kernels" in str(node.target)]
    assert nodes == [overload(op, "fwd")]
    for B in (1, 5):
        sizes = {n: (s[0] if n in ("weight", "bias") else B, *s[1:]) for n, s in case.shapes.items()}
        row = testing.Case(op, case.name, sizes, case.reaches, case.options)
        with record_kernels() as record:
            y = program.module()(*row.inputs(torch.float32).values())
        assert record.counts == native(f"{op}_fwd", isa=_native.cpu_report()["isa"])
        assert torch.equal(y, row.function(mf_kernels)(**row.inputs(torch.float32)))
