"""What only a card can show: every row on both backends, streams, CUDA graphs, compilation, the model's own numbers.

    pytest tests/test_gpu.py                        on a machine with a card
    pytest tests/test_gpu.py -m smoke               some sixty of them, that tell whether anything is badly wrong
    TRITON_INTERPRET=1 pytest tests/test_gpu.py     the same tests on CPU tensors, a few rows: that they run at all

In the second form Triton's interpreter and the library for the CPU stand in for the card. Without either, one skip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import operator_rows
import pytest
import torch
from golden_support import golden_file, recipe_image, recipe_model
from kernel_support import CUDA_OPS
from operator_rows import SMALL
from torch import Tensor

import mf_kernels
from mf_kernels import _registry, _triton, testing
from mobileformer import Model

DRY = _triton.interpreting()
if not DRY and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

if DRY:  # all of them have their properties shown elsewhere: here, that these tests run
    CUDA_OPS = ("mobile_to_former", "dynamic_relu")
pytestmark = pytest.mark.gpu
DEVICE = "cpu" if DRY else "cuda"
BACKENDS = ("triton", "native")
needs_graphs = pytest.mark.skipif(DRY, reason="the CPU has no CUDA graphs and no streams")
HALF = (torch.bfloat16,) if DRY else (torch.bfloat16, torch.float16)  # the library for the CPU has no float16


def rows() -> list[testing.Case]:
    """All there are, each once: real layers, branches of the CPU's kernels, of Triton's, of CUDA's."""
    if DRY:
        return [SMALL[op] for op in CUDA_OPS]
    every = operator_rows.unique(testing.CASES, operator_rows.TRITON, operator_rows.CUDA)
    return [case for case in every if case.op in CUDA_OPS]


# Full precision in planes, half precision in channels_last; every fourth row the other way round, in float16 too
LOOKS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))
MORE_LOOKS = ((torch.float32, "channels_last"), (HALF[-1], "contiguous"))
GRID = [
    pytest.param(
        case,
        backend,
        dtype,
        layout,
        id=f"{case.id}-{backend}-{str(dtype)[6:]}-{layout}",
        marks=[pytest.mark.smoke] if case in SMALL.values() and (dtype, layout) in LOOKS else [],
    )
    for number, case in enumerate(rows())
    for dtype, layout in (*LOOKS, *(MORE_LOOKS if number % 4 == 0 else ()))
    for backend in BACKENDS
]


def first(value: object) -> object:
    """A parameter whose test is among the first ones."""
    return pytest.param(value, marks=pytest.mark.smoke)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, allowed in zip(settings, before, strict=True):
        setting.allow_tf32 = allowed


def given(case: testing.Case, dtype: torch.dtype, layout: str) -> tuple[dict[str, Tensor], Tensor]:
    return case.inputs(dtype, layout=layout, device=DEVICE), case.d_output(dtype, layout=layout, device=DEVICE)


def served(record: mf_kernels.KernelRecord) -> set[str]:
    """Which kernels, by operator, pass, backend and device."""
    return {":".join(name.split(":")[:3]) for name in record.counts}


def run(case: testing.Case, backend: str, inputs: dict[str, Tensor], d_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients; the backend served both, and nothing else did."""
    with mf_kernels.use_backend(backend), mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    assert served(record) == {f"{case.op}_{direction}:{backend}:{DEVICE}" for direction in ("fwd", "bwd")}
    return results


def assert_right(case: testing.Case, dtype: torch.dtype, results: dict[str, Tensor]) -> None:
    expected = testing.expectation(case, dtype)
    allowed = testing.with_saved_exponents(case, dtype, expected)
    for name, tensor in results.items():
        assert tensor.device.type == DEVICE
        testing.assert_close(f"{case.id}: {name}", tensor.cpu(), expected.truth[name], allowed[name], dtype)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty gives
    assert DRY or torch.empty(1000, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "backend", "dtype", "layout"), GRID)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients(case: testing.Case, backend: str, dtype: torch.dtype, layout: str) -> None:
    """Against float64, twice with the same bits."""
    inputs, d_output = given(case, dtype, layout)
    results = run(case, backend, inputs, d_output)
    assert_right(case, dtype, results)
    again = run(case, backend, inputs, d_output)
    assert all(torch.equal(tensor, again[name]) for name, tensor in results.items())


@pytest.mark.parametrize("layout", [first("sliced"), "permuted", "unaligned"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_any_strides(op: str, backend: str, layout: str) -> None:
    """What surrounds the inputs in memory is NaN: reading beside them shows."""
    case, dtype = SMALL[op], torch.float32
    assert_right(case, dtype, run(case, backend, *given(case, dtype, layout)))


@pytest.mark.parametrize("dtype", [first(HALF[0]), *HALF[1:]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_autocast(op: str, backend: str, dtype: torch.dtype) -> None:
    """Inputs in float32, arithmetic and output in the autocast dtype, gradients in float32 again."""
    case = SMALL[op]
    inputs, d_output = given(case, torch.float32, "contiguous")
    with torch.autocast(DEVICE, dtype):
        results = run(case, backend, inputs, d_output.to(dtype))
    narrow = {name: t.to(dtype) for name, t in inputs.items()}
    expected = run(case, backend, narrow, d_output.to(dtype))
    for name, tensor in results.items():
        assert tensor.dtype == (dtype if name == "output" else torch.float32)
        assert torch.equal(tensor.to(dtype), expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_compiled_whole(op: str, backend: str) -> None:
    """One graph by torch.compile, the kernels in it, forward and backward."""
    torch.compiler.reset()
    case, dtype = SMALL[op], torch.float32
    function = torch.compile(case.function(mf_kernels), fullgraph=True, backend="aot_eager" if DRY else "inductor")
    with mf_kernels.use_backend(backend), mf_kernels.record_kernels() as record:
        results = testing.evaluate(function, *given(case, dtype, "channels_last"))
    assert served(record) == {f"{op}_{direction}:{backend}:{DEVICE}" for direction in ("fwd", "bwd")}
    assert_right(case, dtype, results)


@pytest.mark.smoke
@needs_graphs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_captured_in_a_cuda_graph(op: str, backend: str) -> None:
    """Forward and backward in one graph, replayed on other values: the bits of the calls themselves."""
    case, dtype = SMALL[op], torch.float32
    inputs, d_output = given(case, dtype, "channels_last")
    other = {name: t.flip(0).contiguous() for name, t in inputs.items()}
    expected = run(
        case, backend, {n: t.clone(memory_format=torch.preserve_format) for n, t in inputs.items()}, d_output
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for name, tensor in inputs.items():
            tensor.copy_(other[name].view_as(tensor))
        run(case, backend, inputs, d_output)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run(case, backend, inputs, d_output)
        fresh, _ = given(case, dtype, "channels_last")
        for name, tensor in inputs.items():
            tensor.copy_(fresh[name])
        for tensor in results.values():
            tensor.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in results.items())


@pytest.mark.smoke
@needs_graphs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_on_the_current_stream(op: str, backend: str) -> None:
    """The inputs arrive late on another stream: a kernel on the default one would read what was there before."""
    case, dtype = SMALL[op], torch.float32
    values, d_output = given(case, dtype, "contiguous")
    run(case, backend, values, d_output)  # compiled before
    late = {name: torch.full_like(t, float("nan")) for name, t in values.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for name, tensor in late.items():
            tensor.copy_(values[name])
        results = run(case, backend, late, d_output)
    stream.synchronize()
    assert_right(case, dtype, results)


@pytest.mark.skipif(DRY or torch.cuda.device_count() < 2, reason="one device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_on_a_device_that_is_not_the_current_one(op: str, backend: str) -> None:
    case, dtype = SMALL[op], torch.float32
    inputs = case.inputs(dtype, device="cuda:1")
    results = run(case, backend, inputs, case.d_output(dtype, device="cuda:1"))
    assert all(tensor.device.index == 1 for tensor in results.values())
    assert torch.cuda.current_device() == 0
    assert_right(case, dtype, results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_no_samples(op: str, backend: str) -> None:
    case = next(case for case in testing.CASES if case.op == op and case.reaches == "no samples")
    results = run(case, backend, *given(case, torch.float32, "contiguous"))
    assert_right(case, torch.float32, results)


@pytest.mark.skipif(DRY, reason="gigabytes")
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_31_elements(backend: str) -> None:
    """Of a map: 32-bit places would wrap around. The last sample, alone, gives the same bits."""
    x = torch.randn(3, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16).expand(3, 64, 3520, 3520).contiguous()
    x[-1, -1, -1, -100:] = torch.linspace(-3, 3, 100)
    assert x.numel() > 2**31
    theta = torch.randn(3, 128, device=DEVICE, dtype=torch.bfloat16)
    with mf_kernels.use_backend(backend):
        whole = mf_kernels.dynamic_relu(x, theta)[-1:]
        alone = mf_kernels.dynamic_relu(x[-1:].contiguous(), theta[-1:])
    assert torch.equal(whole, alone)


@pytest.mark.skipif(DRY, reason="auto leaves CPU tensors to the CPU")
@pytest.mark.parametrize("op", CUDA_OPS)
def test_auto_is_what_the_table_says(op: str) -> None:
    from mf_kernels import _preference

    assert _registry.route(op, "cuda", torch.bfloat16) == _preference.CUDA[op].backends[0]


def close(value: Tensor, golden: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(value.detach().double().cpu().numpy() - golden).max())


MAKERS: dict[str, Callable[[Model], torch.nn.Module]] = {"model": lambda model: model}
if not DRY:  # on the CPU that is another program
    MAKERS["to_inference"] = Model.to_inference


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("backend", ("native",) if DRY else BACKENDS)
@pytest.mark.parametrize("variant", [first("26m")] if DRY else ["26m", "96m", first("294m")])
def test_logits_in_float32(variant: str, backend: str, make: str) -> None:
    """The published implementation's logits, as close as on the CPU."""
    model = MAKERS[make](recipe_model(variant, dtype=torch.float32).to(DEVICE))
    image = recipe_image(2, 224, 224, seed=1, dtype=torch.float32).to(DEVICE)
    with mf_kernels.use_backend(backend), mf_kernels.record_kernels() as record, torch.no_grad():
        logits = model(image)
    assert record.counts
    assert not any(":reference" in name for name in record.counts)
    assert close(logits, golden_file(variant)["logits_224"]) < 2e-4


@pytest.mark.parametrize("backend", ("native",) if DRY else BACKENDS)
@pytest.mark.parametrize("variant", [first("26m")] if DRY else ["26m", "96m", first("294m")])
def test_logits_in_bfloat16(variant: str, backend: str) -> None:
    """Autocast and the copy for inference: within twice the error of plain PyTorch under autocast."""
    golden = golden_file(variant)["logits_224"]
    image = recipe_image(2, 224, 224, seed=1, dtype=torch.float32).to(DEVICE)

    def typical_error(model: torch.nn.Module, autocast: bool = True) -> float:
        with mf_kernels.use_backend(backend), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logits = model(image)
        return float(np.sqrt(np.square(logits.double().cpu().numpy() - golden).mean()))

    plain = typical_error(recipe_model(variant, dtype=torch.float32, use_fused=False).to(DEVICE))
    fused = recipe_model(variant, dtype=torch.float32).to(DEVICE)
    assert typical_error(fused) < 2 * plain
    if not DRY:
        assert typical_error(fused.to_inference(torch.bfloat16), autocast=False) < 2 * plain


@pytest.mark.parametrize("backend", ("native",) if DRY else BACKENDS)
@pytest.mark.parametrize("variant", [first("26m")] if DRY else ["26m", first("294m")])
def test_training_step(variant: str, backend: str) -> None:
    """Loss and the gradients of all parameters, in float32, against the published implementation's."""
    golden = golden_file(variant)
    model = recipe_model(variant, dtype=torch.float32).to(DEVICE).train()
    target = torch.tensor([1, 10, 100, 999], device=DEVICE)
    with mf_kernels.use_backend(backend), mf_kernels.record_kernels() as record:
        logits = model(recipe_image(4, 128, 128, seed=3, dtype=torch.float32).to(DEVICE))
        loss = torch.nn.functional.cross_entropy(logits, target)
        loss.backward()
    assert {name.split(":")[1] for name in record.counts} == {backend}
    assert abs(loss.item() - golden["train/loss"]) < 1e-3
    norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(float(np.linalg.norm(golden["train/grad/norm"])), rel=2e-2)


@pytest.mark.skipif(DRY, reason="minutes on a CPU")
@pytest.mark.smoke
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_the_model_in_a_cuda_graph(train: bool) -> None:
    """The bits of the calls themselves, after a replay over poisoned results."""
    model = recipe_model("26m", dtype=torch.float32).to(DEVICE).train(train)
    x = recipe_image(4, 128, 128, seed=3, dtype=torch.float32).to(DEVICE)
    parameters = list(model.parameters())

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            logits = model(x)
        return [logits.detach(), *(torch.autograd.grad(logits.square().sum(), parameters) if train else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [call() for _ in range(3)][-1]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    for actual, right in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


def test_rows_are_told_apart() -> None:
    """No two tests of one name: a report keeps each."""
    names = [param.id for param in GRID]
    assert len(names) == len(set(names))
    assert all(dataclasses.is_dataclass(param.values[0]) for param in GRID)
