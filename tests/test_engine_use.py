"""Using the engine: what it takes, what it says of itself, threads and processes."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engine_support import folded, image, isas, needs_engine
from kernel_support import python
from tiny_support import tiny_variants

import mobileformer
from mobileformer import Model
from mobileformer.inference import Engine, FoldedNetwork, fold, library
from mobileformer.inference.threads import most_threads, thread_count
from mobileformer.measure.difference import lively_weights_

pytestmark = needs_engine

# Runs in a process without torch, on the folded network that it is given.
WITHOUT_TORCH = """
import json, os, sys, threading, time
import numpy as np
from mobileformer.inference import Engine
x = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
"""


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Small networks, where neither the kernels' shapes nor another process ask for a published one."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def run() -> Engine:
    return Engine(folded("26m"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folded") / "26m.safetensors"
    folded("26m").save(path)
    return path


# What goes in and comes out


def test_what_an_engine_says_of_itself(tmp_path: Path) -> None:
    model = Model("96m", num_classes=3, in_chans=1, spatial_dynamic_relu=True)
    fold(model, labels=["ant", "bee", "cat"], mean=[0.25], std=[0.5]).save(tmp_path / "network.safetensors")
    engine = Engine(tmp_path / "network.safetensors", "bfloat16", threads=2)
    assert (engine.variant, engine.num_classes, engine.in_chans) == ("96m", 3, 1)
    assert (engine.labels, engine.mean, engine.std) == (("ant", "bee", "cat"), (0.25,), (0.5,))
    assert (engine.dtype, engine.threads, engine.isa) == ("bfloat16", 2, isas()[-1])
    assert engine.config is mobileformer.VARIANTS["96m"]
    assert engine.metadata.spatial_dynamic_relu
    assert repr(engine) == f"Engine(96m, bfloat16, threads=2, isa={isas()[-1]})"


def test_a_path_may_be_text(path: Path, run: Engine) -> None:
    x = image(1, 64, 64)
    np.testing.assert_array_equal(Engine(str(path))(x), run(x))
    np.testing.assert_array_equal(run.forward(x), run(x))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_normalised_inside(channels: int, isa: str) -> None:
    mean, std = [0.4, 0.5, 0.6, 0.1][:channels], [0.2, 0.25, 0.3, 1.5][:channels]
    model = Model("tiny_ungrouped", num_classes=10, in_chans=channels).eval()
    lively_weights_(model)
    engine = Engine(fold(model, mean=mean, std=std), isa=isa)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 45, 38, channels), dtype=np.uint8)
    exact = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_allclose(engine(pixels), engine(exact), rtol=0, atol=1e-4)


def test_strides_do_not_matter_and_the_input_is_left_alone(run: Engine) -> None:
    x = image(2, 64, 80)
    expected = run(x)
    spread = np.full((2, 3, 64, 160), np.nan, np.float32)[..., ::2]
    spread[...] = x
    reversed_twice = np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    for other in (np.asfortranarray(x), spread, reversed_twice, x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(run(other), expected)
    x.flags.writeable = False
    np.testing.assert_array_equal(run(x), expected)
    np.testing.assert_array_equal(x, image(2, 64, 80))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "spatial"), [("26m", False), ("96m", True), ("294m", False)])
def test_an_image_does_not_depend_on_those_beside_it(variant: str, spatial: bool, dtype: str, isa: str) -> None:
    """Images of a batch go through the tokens together, up to eight at a time."""
    engine = Engine(folded(variant, spatial), dtype, isa=isa)
    x = image(11, 64, 40)
    maps, tokens = engine.forward_features(x)
    logits = engine(x)
    for at in range(len(x)):
        alone, token = engine.forward_features(x[at : at + 1])
        np.testing.assert_array_equal(tokens[at], token[0])
        for together, map_alone in zip(maps, alone, strict=True):
            np.testing.assert_array_equal(together[at], map_alone[0])
        # the classifier takes the whole batch at once, and adds in another order
        np.testing.assert_allclose(logits[at], engine(x[at : at + 1])[0], rtol=0, atol=1e-4)
    # but which images they are makes no difference
    others = np.concatenate([x[:5], 3 * image(6, 64, 40, seed=5)])
    np.testing.assert_array_equal(engine(others)[:5], logits[:5])


def test_results_belong_to_the_caller(run: Engine) -> None:
    """A later call does not write over them."""
    a, b = image(1, 64, 64, seed=1), image(1, 64, 64, seed=2)
    first, (maps, tokens) = run(a), run.forward_features(a)
    kept = [value.copy() for value in (first, *maps, tokens)]
    run(b)
    run.forward_features(b)
    for value, before in zip((first, *maps, tokens), kept, strict=True):
        np.testing.assert_array_equal(value, before)
        assert value.flags.writeable


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((1, 3, 64, 64)), TypeError, r"expected float32 \(B, 3, H, W\) or uint8 \(B, H, W, 3\), got float64"),
        (np.zeros((1, 3, 64, 64), ">f4"), TypeError, "x: expected float32"),
        ([[[[0.0]]]], TypeError, "x: expected a numpy array, got list"),
        (np.zeros((3, 64, 64), np.float32), ValueError, r"4 dimensions \(B, 3, H, W\), got shape \(3, 64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), ValueError, r"x: expected 4 dimensions \(B, H, W, 3\), got shape"),
        (np.zeros((1, 64, 64, 3), np.float32), ValueError, "x: expected 3 channels, got 64"),
        (np.zeros((1, 3, 64, 64), np.uint8), ValueError, "x: expected 3 channels, got 64"),
        (np.zeros((1, 3, 31, 64), np.float32), ValueError, "x: expected height and width of at least 32, got 31 x 64"),
        (np.zeros((1, 64, 0, 3), np.uint8), ValueError, "x: expected height and width of at least 32, got 64 x 0"),
        (np.full((1, 3, 32, 32), np.nan, np.float32), ValueError, "x: holds NaN or infinity"),
        (np.full((1, 3, 32, 32), -np.inf, np.float32), ValueError, "x: holds NaN or infinity"),
    ],
)
def test_what_is_no_image_is_refused(run: Engine, x: np.ndarray, error: type[Exception], message: str) -> None:
    for call in (run, run.forward_features, run.stages, run.profile):
        with pytest.raises(error, match=message):
            call(x)


def test_the_largest_numbers_are_no_infinity(run: Engine) -> None:
    x = np.full((1, 3, 32, 32), np.finfo(np.float32).max, np.float32)
    assert run(x).shape == (1, 1000)


def test_bytes_need_mean_and_std() -> None:
    engine = Engine(fold(Model("tiny", num_classes=2, in_chans=2)))
    assert engine(np.zeros((1, 2, 32, 32), np.float32)).shape == (1, 2)
    with pytest.raises(ValueError, match="x: the network says no mean and std to normalise uint8 with"):
        engine(np.zeros((1, 32, 32, 2), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16, got 'float16'"),
        ({"threads": 0}, "threads: expected an integer of at least 1, got 0"),
        ({"threads": True}, "threads: expected an integer"),
        ({"threads": 1.0}, "threads: expected an integer"),
        ({"isa": "sse9"}, "isa: expected an instruction set of this CPU, one of .*, got 'sse9'"),
        ({"isa": ""}, "isa: expected an instruction set"),
    ],
)
def test_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(folded("tiny"), **arguments)


def test_the_compiled_network_checks_for_itself(run: Engine) -> None:
    """Nothing that reaches the library from Python can make it read past an array."""
    network, arrays = folded("26m"), dict(folded("26m").arrays)
    module = library.library()
    from mobileformer.inference.engine import _plain

    def build(changed: dict, **config: object) -> None:
        module.Network(_plain(network) | config, changed, "float32", 1, isas()[0])

    build(arrays)
    for name in ("stem.weight", "blocks.3.former.ffn_expand.bias", "tokens", "head.classifier.bias"):
        with pytest.raises(ValueError, match=name):
            build({key: value for key, value in arrays.items() if key != name})
        with pytest.raises(ValueError, match=name):
            build(arrays | {name: arrays[name][..., :-1].copy()})
    with pytest.raises(ValueError, match=r"stem\.scale"):
        build(arrays | {"stem.scale": np.zeros(8, np.float32)})
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it calls it
        build(arrays, num_tokens=4)
    with pytest.raises(ValueError):  # noqa: PT011
        build(arrays, num_classes=1001)
    blocks = [dict(block) for block in _plain(network)["blocks"]]
    blocks[-1]["out_channels"] = 320
    with pytest.raises(ValueError, match="at most 256 channels of a grouped block, got 320"):
        build(arrays, blocks=blocks)
    with pytest.raises(ValueError, match="sse9"):
        module.Network(_plain(network), arrays, "float32", 1, "sse9")


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_ungrouped"])
def test_a_network_without_a_classifier_gives_maps_and_tokens(variant: str, dtype: str, isa: str) -> None:
    """What a detector is built on: the backbone's arrays alone, and the same bits as with a classifier."""
    network = folded(variant)
    module = library.library()
    from mobileformer.inference.engine import _plain

    config = _plain(network) | {"num_classes": 0}
    arrays = {name: array for name, array in network.arrays.items() if not name.startswith("head.")}
    assert module.array_shapes(config).keys() == arrays.keys()
    with pytest.raises(ValueError, match=r"head\.[a-z.]+ is not part of this network"):
        module.Network(config, dict(network.arrays), dtype, 1, isa)
    with pytest.raises(ValueError, match=r"head\.[a-z.]+ is missing"):
        module.Network(_plain(network), arrays, dtype, 1, isa)
    whole = Engine(network, dtype, isa=isa)
    for threads in (1, 3):
        backbone = module.Network(config, arrays, dtype, threads, isa)
        for shape in ((1, 64, 64), (2, 33, 47), (11, 64, 40)):
            x = image(*shape)
            maps, tokens = backbone.forward_features(x)
            expected_maps, expected_tokens = whole.forward_features(x)
            np.testing.assert_array_equal(tokens, expected_tokens)
            for actual, expected in zip(maps, expected_maps, strict=True):
                np.testing.assert_array_equal(actual, expected)
        stages = backbone.stages(x)
        assert {"pooled", "hidden", "logits"} == whole.stages(x).keys() - stages.keys()
        assert not any(name.startswith("head") for name, _, _ in backbone.profile(x, 1))
        with pytest.raises(ValueError, match="forward: this network has no classifier, only forward_features"):
            backbone.forward(x)


# Instruction sets


@pytest.mark.parametrize("isa", isas())
def test_an_instruction_set_is_asked_for(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine(folded("tiny"), isa=isa).isa == isa
    monkeypatch.setenv("MF_ENGINE_ISA", isa)
    assert Engine(folded("tiny")).isa == isa
    assert Engine(folded("tiny"), isa=isas()[0]).isa == isas()[0]
    assert library.status() == library.status() | {"available": True, "isa": isa, "reason": None}


def test_an_unknown_instruction_set_in_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_ENGINE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"MF_ENGINE_ISA: expected an instruction set of this CPU, one of .*'sse9'"):
        Engine(folded("tiny"))
    status = library.status()
    assert not status["available"]
    assert status["isa"] is None
    assert "MF_ENGINE_ISA" in status["reason"]
    monkeypatch.setenv("MF_ENGINE_ISA", "")
    assert Engine(folded("tiny")).isa == isas()[-1]


def test_instruction_sets_round_differently_and_no_more() -> None:
    x = image(1, 64, 64)
    results = {isa: Engine(folded("96m"), isa=isa)(x) for isa in isas()}
    for value in results.values():
        np.testing.assert_allclose(value, results[isas()[0]], rtol=0, atol=2e-4)


# Threads and processes


@pytest.mark.parametrize("threads", [2, 3])  # windows of hidden maps mostly come out even for two, not for three
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "spatial"), [("26m", False), ("96m", False), ("96m", True)])
def test_more_threads_give_the_same(variant: str, spatial: bool, dtype: str, threads: int) -> None:
    one, more = (Engine(folded(variant, spatial), dtype, threads=n) for n in (1, threads))
    for shape in ((1, 64, 64), (2, 33, 47), (3, 96, 64), (9, 64, 40)):
        x = image(*shape)
        np.testing.assert_array_equal(more(x), one(x))
        np.testing.assert_array_equal(more.forward_features(x)[1], one.forward_features(x)[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_callers_of_one_engine(threads: int) -> None:
    """Each with images and sizes of its own, at the same time."""
    engine = Engine(folded("26m"), threads=threads)
    images = [image(1 + seed % 2, 32 + 16 * (seed % 3), 64, seed) for seed in range(8)]
    expected = [engine(x) for x in images]
    start = threading.Barrier(4)

    def work(offset: int) -> None:
        start.wait()
        for round in range(3):
            for index in range(8):
                at = (index + offset + round) % 8
                np.testing.assert_array_equal(engine(images[at]), expected[at])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_the_interpreter_runs_on_meanwhile() -> None:
    """While a long call runs in a thread, this one is never kept waiting as long as the call lasts."""
    engine = Engine(folded("96m"))
    x = image(24, 128, 128)
    engine(x)
    for _ in range(5):  # another process may take the processor away just then
        worker = threading.Thread(target=engine, args=(x,))
        began = before = time.perf_counter()
        worker.start()
        longest = 0.0
        while worker.is_alive():
            time.sleep(0)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        if longest < (before - began) / 2:
            return
    pytest.fail(f"waited {longest:.3f} s in a call of {before - began:.3f} s")


def test_idle_threads_do_not_burn_a_processor(path: Path) -> None:
    code = (
        WITHOUT_TORCH
        + """
engine = Engine(sys.argv[1], threads=2)
engine(x)
before = time.process_time()
time.sleep(0.7)
print(time.process_time() - before)
"""
    )
    done = python(code, str(path))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_can_call(path: Path, threads: int) -> None:
    """Threads do not survive a fork: the child's engine has to find that out."""
    code = (
        WITHOUT_TORCH
        + """
engine = Engine(sys.argv[1], threads=int(sys.argv[2]))
expected = engine(x)
child = os.fork()
if child == 0:
    os._exit(0 if (engine(x) == expected).all() else 1)
deadline = time.monotonic() + 30
while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
if done[0] == 0:
    os.kill(child, 9)
    sys.exit("the child hangs")
assert (engine(x) == expected).all()
sys.exit(os.waitstatus_to_exitcode(done[1]))
"""
    )
    done = python(code, str(path), str(threads))
    assert done.returncode == 0, done.stderr


def test_an_engine_ends_with_its_process(path: Path) -> None:
    """Neither calls that run or wait for the interpreter's lock, nor threads that sleep, keep it from leaving."""
    code = (
        WITHOUT_TORCH
        + """
engine = Engine(sys.argv[1], threads=2)
for _ in range(4):
    threading.Thread(target=lambda: [engine(x) for _ in range(10**6)], daemon=True).start()
time.sleep(0.2)
other = Engine(sys.argv[1], threads=2)
other(x)
del other
"""
    )
    began = time.monotonic()
    done = python(code, str(path))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30


def test_an_engine_is_neither_copied_nor_pickled(run: Engine) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="belongs to its process and cannot be copied or pickled: open the file"):
            attempt(run)


def test_no_torch_is_loaded(path: Path, run: Engine) -> None:
    code = (
        WITHOUT_TORCH
        + """
logits = Engine(sys.argv[1])(x)
assert not {"torch", "mf_kernels", "safetensors", "typer", "PIL"} & set(sys.modules), sorted(sys.modules)
print(json.dumps(logits.tolist()))
"""
    )
    done = python(code, str(path))
    assert done.returncode == 0, done.stderr
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    np.testing.assert_array_equal(np.array(json.loads(done.stdout), np.float32), run(x))


# The profile


def test_a_profile_has_every_stage_once(run: Engine) -> None:
    rows = run.profile(image(1, 224, 224), repeats=3)
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names)
    assert all(seconds >= 0 for _, seconds, _ in rows)
    # The published number of 26m is 26 million; convolutions, linear layers and matrix products alone are 23.6.
    assert 23e6 < sum(count for _, _, count in rows) < 28e6
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        run.profile(image(1, 64, 64), repeats=0)


def test_a_folded_network_may_be_made_by_hand(run: Engine) -> None:
    network = folded("26m")
    again = FoldedNetwork(network.metadata, {name: np.asfortranarray(a) for name, a in network.arrays.items()})
    x = image(1, 64, 64)
    np.testing.assert_array_equal(Engine(again)(x), run(x))


def test_more_threads_than_make_sense_are_refused(path: Path) -> None:
    """A thousand would wait for each other at every layer."""
    for threads in (most_threads() + 1, 10**30):
        with pytest.raises(ValueError, match=rf"^threads: expected an integer of at most {most_threads()} on this"):
            Engine(path, threads=threads)
        with pytest.raises(ValueError, match=r"^threads: expected an integer of at most"):
            Model("tiny").to_inference(threads=threads)
        with pytest.raises(ValueError, match=r"^threads: expected an integer of at most"), thread_count(threads):
            pass


def test_threads_that_the_system_refuses_are_an_error_and_leave_none_behind(path: Path) -> None:
    """In a process that may have less address space than the stacks of all of them take."""
    code = (
        WITHOUT_TORCH
        + """
import resource, threading
Engine(sys.argv[1], threads=1)(x)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (200 << 20), in_use + (200 << 20)))
for _ in range(3):
    try:
        Engine(sys.argv[1], threads=64)
    except RuntimeError as error:
        print(error)
    for _ in range(1000):
        if threads() == before: break
        time.sleep(0.01)
    assert threads() == before, threads()
print(Engine(sys.argv[1], threads=2)(x).shape)
"""
    )
    done = python(code, str(path))
    assert done.returncode == 0, done.stderr
    *told, shape = done.stdout.splitlines()
    assert len(told) == 3
    assert all(line.startswith("threads: the system gave ") and " of 64: " in line for line in told)
    assert shape == "(2, 1000)"
