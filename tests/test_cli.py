"""The command line: what it prints, what it refuses, how it leaves."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mobileformer
from mobileformer.cli import app, contenders, output
from mobileformer.data import load_image, sample_photo
from mobileformer.measure import difference, interleaved, lively_weights_

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")

NAMES = ["ant", "bee [old]", "cat", "dog, large", "éléphant", "fox", "gnu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a 26m with 7 classes in several files, and images good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    model = mobileformer.Model("26m", num_classes=7).eval()
    lively_weights_(model, seed=3)
    mobileformer.save_weights(model, folder / "plain.safetensors")
    mobileformer.save_weights(model, folder / "named.safetensors", labels=NAMES)
    state = {f"module.{key}": value for key, value in mobileformer.official_state_dict(model).items()}
    checkpoint = {
        "state_dict": state,
        "epoch": 449,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {}},
    }
    torch.save(checkpoint, folder / "published.pth.tar")
    grey = mobileformer.Model("26m", num_classes=7, in_chans=1).eval()
    lively_weights_(grey, seed=4)
    mobileformer.save_weights(grey, folder / "grey.safetensors", mean=[0.25], std=[0.5])
    mobileformer.save_weights(grey, folder / "no_mean.safetensors")
    images = folder / "images"
    (images / "deep").mkdir(parents=True)
    photo = Image.open(sample_photo())
    photo.save(images / "b.png")
    photo.rotate(90, expand=True).save(images / "deep" / "c.webp")
    photo.crop((100, 50, 200, 180)).save(images / "a.jpg")
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def expected(weights: Path, image: Path, size: int = 64) -> list[tuple[int, float]]:
    """(class, probability), most probable first, in float64 on the plain path."""
    metadata = mobileformer.read_metadata(weights)
    model = mobileformer.load_model(weights, use_fused=False).double()
    array = load_image(image, size=size, mean=metadata.mean, std=metadata.std)
    with torch.no_grad():
        probabilities = model(torch.from_numpy(array)[None].double())[0].softmax(0)
    return sorted(enumerate(probabilities.tolist()), key=lambda pair: -pair[1])


# info


def test_info_counts_the_real_models() -> None:
    report = run_json("info")
    assert {name: row["parameters"] for name, row in report["variants"].items()} == {
        "26m": 3_232_788,
        "52m": 3_469_092,
        "96m": 4_585_252,
        "151m": 7_595_828,
        "214m": 9_425_920,
        "294m": 11_422_648,
        "508m": 13_976_976,
    }
    assert report["variants"]["294m"]["published_top1_percent"] == 77.9
    assert {row["op"] for row in report["kernels"]} >= {
        "mobile_to_former",
        "former_to_mobile",
        "dynamic_relu",
        "depthwise_conv2d",
    }
    assert all(row["available"] or row["reason"] for row in report["kernels"])
    assert {"cpu", "instruction_set", "threads", "torch"} <= set(report["machine"])


def test_info_as_tables() -> None:
    told = run("info").stdout
    for words in (
        "11 422 648",
        "295.4 M",
        "286.7 M",
        "fvcore",
        "77.9 %",
        "README",
        "mobile_to_former",
        "threads",
    ):
        assert words in told


@pytest.mark.parametrize("variant", ["26m", "294m"])
def test_the_stated_multiply_adds_are_those_of_the_model(variant: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from mobileformer.published import MADDS

    with torch.device("meta"):
        model = mobileformer.Model(variant, use_fused=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e6 == MADDS[variant]["conv+linear+matmul"]


def test_every_variant_has_its_numbers() -> None:
    from mobileformer.published import COUNTERS, MADDS

    assert list(MADDS) == list(mobileformer.VARIANTS)
    for name, row in MADDS.items():
        assert set(row) == set(COUNTERS)
        assert row["fvcore"] == pytest.approx(float(name.removesuffix("m")), rel=0.02)


# predict


@pytest.mark.parametrize("weights", ["named.safetensors", "published.pth.tar"])
@pytest.mark.parametrize("path", ["--fused", "--no-fused"])
def test_predict_gives_the_probabilities_of_the_model(folder: Path, weights: str, path: str) -> None:
    image = folder / "images" / "b.png"
    report = run_json("predict", image, "--weights", folder / weights, "--size", 64, "--top-k", 3, path)
    (answer,) = report["results"]
    assert report["fused"] == (path == "--fused")
    assert answer["image"] == str(image)
    assert len(answer["predictions"]) == 3
    for row, (index, probability) in zip(
        answer["predictions"], expected(folder / weights, image), strict=False
    ):
        assert row["class"] == index
        assert row["probability"] == pytest.approx(probability, abs=1e-5)
        assert row["label"] == (NAMES[index] if weights.startswith("named") else None)


def test_predict_prints_names_as_they_are(folder: Path) -> None:
    image = folder / "images" / "b.png"
    told = run("predict", image, "--weights", folder / "named.safetensors", "--size", 64, "--top-k", 9).stdout
    for name in NAMES:  # "bee [old]" would vanish if it were read as markup
        assert name in told
    _, probability = expected(folder / "named.safetensors", image)[0]
    assert f"{100 * probability:.2f} %" in told


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_predict_folder_in_batches(folder: Path, batch: int) -> None:
    weights = folder / "plain.safetensors"
    report = run_json("predict", folder / "images", "--weights", weights, "--size", 64, "--batch", batch)
    names = [Path(answer["image"]).name for answer in report["results"]]
    assert names == ["a.jpg", "b.png", "c.webp"]
    for answer in report["results"]:
        index, probability = expected(weights, Path(answer["image"]))[0]
        assert answer["predictions"][0]["class"] == index
        assert answer["predictions"][0]["probability"] == pytest.approx(probability, abs=1e-5)


def test_predict_reports_bad_files_and_does_the_rest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0_empty.png").touch()
    (tmp_path / "1_good.png").write_bytes((folder / "images" / "b.png").read_bytes())
    (tmp_path / "2_cut.jpg").write_bytes((folder / "images" / "a.jpg").read_bytes()[:900])
    arguments = (
        "predict",
        tmp_path,
        "nowhere.png",
        f"{tmp_path}/*.bmp",
        "--weights",
        folder / "plain.safetensors",
    )
    result = run(*arguments, "--size", 64, "--json", code=1)
    report = json.loads(result.stdout)
    assert report["failed"] == 4
    assert ["error" in answer for answer in report["results"]] == [True, False, True, True, True]
    assert len(report["results"][1]["predictions"]) == 5
    for words in (
        "0_empty.png: the file is empty",
        "2_cut.jpg: ",
        "nowhere.png: no such file",
        "*.bmp: no file",
    ):
        assert words in result.stderr
    assert "4 of 5 failed" in result.stderr


def test_predict_without_weights_says_how_to_get_them(folder: Path) -> None:
    result = run("predict", folder / "images" / "b.png", code=1)
    assert result.stdout == ""
    for words in ("--weights", "mobileformer convert", "save_weights", "random"):
        assert words in result.stderr
    assert "--weights" in run_json("predict", folder / "images" / "b.png", code=1)["error"]


def test_predict_grey_weights_take_colour_images(folder: Path) -> None:
    weights, image = folder / "grey.safetensors", folder / "images" / "b.png"
    (answer,) = run_json("predict", image, "--weights", weights, "--size", 64)["results"]
    index, probability = expected(weights, image)[0]
    assert answer["predictions"][0]["class"] == index
    assert answer["predictions"][0]["probability"] == pytest.approx(probability, abs=1e-5)
    failure = run_json("predict", image, "--weights", folder / "no_mean.safetensors", code=1)
    assert "normalised" in failure["error"]


def test_predict_refuses_weights_that_answer_with_nan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mobileformer.Model, "forward", lambda self, x: torch.full((len(x), 7), float("nan")))
    image = folder / "images" / "b.png"
    report = run_json("predict", image, "--weights", folder / "plain.safetensors", "--size", 64, code=1)
    assert "not finite" in report["results"][0]["error"]
    assert "predictions" not in report["results"][0]


def test_predict_labels(folder: Path, tmp_path: Path) -> None:
    weights, image = folder / "plain.safetensors", folder / "images" / "b.png"
    top = expected(weights, image)[0][0]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\r\n".join(NAMES) + "\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(NAMES))
    for file in ("lines.txt", "list.json"):
        report = run_json("predict", image, "--weights", weights, "--size", 64, "--labels", tmp_path / file)
        assert report["results"][0]["predictions"][0]["label"] == NAMES[top]
    for name, content, words in (
        ("short.txt", "\n".join(NAMES[:6]), "expected 7 names, one for each class, found 6"),
        ("gap.txt", "a\n\nb\nc\nd\ne\nf", "not empty"),
        ("numbers.json", "[1, 2, 3, 4, 5, 6, 7]", "expected a list"),
        ("dict.json", json.dumps({str(i): name for i, name in enumerate(NAMES)}), "expected a list"),
        ("cut.json", "[1, ", "not valid JSON"),
        ("latin.txt", "\udce9", "utf-8"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
        failure = run_json("predict", image, "--weights", weights, "--labels", tmp_path / name, code=1)
        assert words in failure["error"]
    failure = run_json("predict", image, "--weights", weights, "--labels", tmp_path / "none.txt", code=1)
    assert "none.txt" in failure["error"]


def test_predict_as_a_table_without_names(folder: Path, tmp_path: Path) -> None:
    weights, image = folder / "plain.safetensors", folder / "images" / "b.png"
    told = run("predict", image, "--weights", weights, "--size", 64, "--top-k", 1).stdout
    index, probability = expected(weights, image)[0]
    assert f" {index} " in told
    assert f"{100 * probability:.2f} %" in told
    result = run("predict", tmp_path / "none.png", "--weights", weights, code=1)
    assert result.stdout == ""
    assert "none.png: no such file" in result.stderr


def test_predict_refuses_weights_no_image_fits(folder: Path, tmp_path: Path) -> None:
    image = folder / "images" / "b.png"
    five = mobileformer.Model("26m", num_classes=2, in_chans=5)
    mobileformer.save_weights(five, tmp_path / "five.safetensors", mean=[0.5] * 5, std=[0.5] * 5)
    failure = run_json("predict", image, "--weights", tmp_path / "five.safetensors", code=1)
    assert "takes 5 channels" in failure["error"]
    broken = mobileformer.Model("26m", num_classes=2)
    broken.head.classifier.bias.data[0] = float("nan")
    mobileformer.save_weights(broken, tmp_path / "nan.safetensors")
    failure = run_json("predict", image, "--weights", tmp_path / "nan.safetensors", code=1)
    assert "not finite: head.classifier.bias" in failure["error"]


def test_predict_names_bad_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    for name in ("none.safetensors", "text.pth"):
        failure = run_json("predict", folder / "images" / "b.png", "--weights", tmp_path / name, code=1)
        assert name in failure["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_is_not_silently_replaced(folder: Path) -> None:
    weights = folder / "plain.safetensors"
    for arguments in (
        ("predict", "x.png", "--weights", weights),
        ("bench", "--variant", "26m", "--no-compile"),
    ):
        assert "no CUDA device" in run_json(*arguments, "--device", "cuda", code=1)["error"]


# convert


def test_convert_there_and_back(folder: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth.tar"
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    report = run_json("convert", folder / "published.pth.tar", ours, "--labels", tmp_path / "names.txt")
    assert (report["variant"], report["num_classes"], report["labels"]) == ("26m", 7, True)
    metadata = mobileformer.read_metadata(ours)
    assert (metadata.variant, metadata.labels) == ("26m", tuple(NAMES))
    assert run_json("convert", ours, back)["form"] == "published checkpoint"
    first = torch.load(folder / "published.pth.tar", weights_only=False)["state_dict"]
    second = torch.load(back, weights_only=True)["state_dict"]
    assert [key.removeprefix("module.") for key in first] == list(second)
    for key, value in first.items():
        assert torch.equal(second[key.removeprefix("module.")], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.pth.tar",
        "names.txt",
        "ours.safetensors",
    ]


@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_convert_tells_grouped_from_plain(tmp_path: Path, variant: str) -> None:
    model = mobileformer.Model(variant)
    torch.save(mobileformer.official_state_dict(model), tmp_path / "in.pth")
    assert run_json("convert", tmp_path / "in.pth", tmp_path / "out.safetensors")["variant"] == variant


def test_convert_keeps_labels_of_our_files(folder: Path, tmp_path: Path) -> None:
    run("convert", folder / "named.safetensors", tmp_path / "copy.safetensors")
    assert mobileformer.read_metadata(tmp_path / "copy.safetensors").labels == tuple(NAMES)


def test_convert_overwrites_only_when_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert "--force" in run_json("convert", folder / "published.pth.tar", target, code=1)["error"]
    assert target.read_text() == "precious"
    run("convert", folder / "published.pth.tar", target, "--force")
    assert mobileformer.read_metadata(target).variant == "26m"


def test_convert_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    source, target = folder / "published.pth.tar", tmp_path / "out.safetensors"
    assert "says 52m" in run_json("convert", source, target, "--variant", "52m", code=1)["error"]
    state = dict(torch.load(source, weights_only=False)["state_dict"])
    del state["module.stem.0.weight"]
    torch.save(state, tmp_path / "lacks.pth")
    assert "--variant" in run_json("convert", tmp_path / "lacks.pth", target, code=1)["error"]
    named = run_json("convert", tmp_path / "lacks.pth", target, "--variant", "26m", code=1)["error"]
    assert "missing: stem.0.weight" in named
    assert "nowhere.pth" in run_json("convert", tmp_path / "nowhere.pth", target, code=1)["error"]
    deep = tmp_path / "no" / "folder.safetensors"
    assert "folder" in run_json("convert", source, deep, code=1)["error"]
    assert not target.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "in.pth", "out.onnx"),
        ("convert", "in.pth", "out.pth", "--labels", "names.txt"),
        ("convert", "in.pth", "out.safetensors", "--variant", "295m"),
        ("convert", "in.pth"),
        ("predict",),
        ("predict", "x.png", "--top-k", "0"),
        ("predict", "x.png", "--batch", "0"),
        ("predict", "x.png", "--device", "tpu"),
        ("bench", "--variant", "1m"),
        ("bench", "--size", "16"),
        ("bench", "--train", "--batch", "1"),
        ("bench", "--train", "--dtype", "bfloat16"),
        ("bench", "--repeats", "0"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr


# bench and demo

SMALL = ("--variant", "26m", "--size", "32", "--repeats", "2")


def test_bench_inference(folder: Path) -> None:
    image = folder / "images" / "a.jpg"
    report = run_json("bench", *SMALL, "--no-compile", "--batch", 2, "--image", image)
    rows = {row["name"]: row for row in report["contenders"]}
    assert list(rows) == ["eager", "eager channels_last", "fused", "fused inference"]
    faster = min(rows["eager"]["min_ms"], rows["eager channels_last"]["min_ms"])
    for row in rows.values():
        assert row["error"] is None
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["speedup"] == pytest.approx(faster / row["min_ms"])
        assert row["relative_logit_difference"] < 3e-5
        assert row["logit_difference"] > 0 or row["relative_logit_difference"] == 0
    assert rows["eager"]["kernels"] == {}
    assert sum(rows["fused"]["kernels"].values()) > 20
    assert report["machine"]["threads"] == 1
    assert report["image"] == str(image)


def test_bench_training() -> None:
    report = run_json("bench", *SMALL, "--no-compile", "--train", "--batch", 8)
    assert [row["name"] for row in report["contenders"]] == ["eager", "eager channels_last", "fused"]
    for row in report["contenders"]:
        assert row["error"] is None
        assert 0 < row["relative_gradient_difference"] < 5e-2


def test_bench_bfloat16() -> None:
    report = run_json("bench", *SMALL, "--no-compile", "--dtype", "bfloat16")
    differences = [row["relative_logit_difference"] for row in report["contenders"]]
    assert all(1e-4 < difference < 0.1 for difference in differences)


def test_bench_compiles_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    told = " ".join(run("bench", *SMALL).stdout.split())
    assert len(compiled) == 1
    for words in (
        "compile",
        "eager channels_last",
        "fused inference",
        "min, ms",
        "median, ms",
        "threads 1",
    ):
        assert words in told


def test_bench_does_not_time_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 1.001

    monkeypatch.setattr(mobileformer.Model, "to_inference", lambda self, dtype: Wrong(self))
    result = run("bench", *SMALL, "--no-compile", "--json", code=1)
    rows = {row["name"]: row for row in json.loads(result.stdout)["contenders"]}
    assert "off by 1.0e-03" in rows["fused inference"]["error"]
    assert rows["fused inference"]["min_ms"] is None
    assert rows["fused"]["min_ms"] > 0
    told = run("bench", *SMALL, "--no-compile", code=1)
    assert "fused inference" in told.stderr
    assert "fused inference" not in told.stdout


def test_bench_goes_on_where_compilation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    rows = {row["name"]: row for row in run_json("bench", *SMALL, code=1)["contenders"]}
    assert rows["compile"]["error"] == "RuntimeError: no C++ compiler"
    assert rows["fused"]["min_ms"] > 0


def test_wrong_gradients_are_not_timed() -> None:
    trial = contenders.Trial("26m", torch.randn(8, 3, 32, 32), train=True)
    trial.add("eager", "fused")
    parameter = trial.contenders[1].parameters[0]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, 10.0))
    assert not trial.check()
    trial.time(1)
    right, wrong = trial.rows()
    assert right["error"] is None
    assert "gradients are off" in wrong["error"]
    assert wrong["min_ms"] is None


def test_demo_shows_agreement_and_no_classes() -> None:
    report = run_json("demo", "--variant", "26m", "--repeats", 1)
    assert Path(report["image"]) == sample_photo()
    assert {row["name"] for row in report["contenders"]} == {
        "eager",
        "eager channels_last",
        "fused",
        "fused inference",
    }
    assert all(row["relative_logit_difference"] < 1e-9 for row in report["contenders_float64"])
    told = run("demo", sample_photo(), "--variant", "26m", "--repeats", 1).stdout
    for words in ("random", "no class", "fused inference", "float64", "chelsea.jpg"):
        assert words in told
    assert "no such file" in run_json("demo", "missing.jpg", "--variant", "26m", code=1)["error"]


def test_demo_fails_when_paths_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.LOGIT_BOUNDS, torch.float64, 0.0)
    result = run("demo", "--variant", "26m", "--repeats", 1, code=1)
    assert "error: float64 fused: logits are off" in result.stderr
    assert "Off in float64: see errors" in " ".join(result.stdout.split())


# measuring


def test_interleaved_takes_turns() -> None:
    order: list[str] = []
    timings = interleaved(
        {name: (lambda name=name: order.append(name)) for name in "abc"}, repeats=4, warmup=1
    )
    assert order == list("abc" * 5)
    assert all(len(timing.samples_ms) == 4 and timing.calls == 1 for timing in timings.values())


def test_interleaved_measures_time() -> None:
    timings = interleaved(
        {"slow": lambda: time.sleep(0.01), "fast": lambda: None}, repeats=3, min_sample_ms=1.0
    )
    assert timings["slow"].calls == 1
    assert timings["slow"].min_ms >= 10
    assert timings["fast"].calls > 100
    assert timings["fast"].median_ms < 0.1
    for arguments in ({"contenders": {}}, {"contenders": {"a": print}, "repeats": 0}):
        with pytest.raises(ValueError, match="expected a contender"):
            interleaved(**arguments)


def test_difference_never_passes_what_is_not_finite() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert difference(exact + torch.tensor([0.0, 0.5]), exact) == contenders.Difference(0.5, 0.125)
    for bad in (float("nan"), float("inf")):
        assert difference(torch.tensor([1.0, bad]), exact).relative == float("inf")
    assert difference(torch.ones(2), torch.zeros(2)).relative == float("inf")
    with pytest.raises(ValueError, match="shape"):
        difference(torch.ones(3), exact)


def test_lively_weights_are_seeded_and_reach_every_part() -> None:
    first, second, other = (mobileformer.Model("26m", use_fused=False).double().eval() for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        lively_weights_(model, seed)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)))
    logits = first(x)
    assert torch.equal(logits, second(x))
    assert not torch.allclose(logits, other(x), atol=0.1)
    (logits * torch.arange(1000)).sum().backward()
    for name, parameter in first.named_parameters():
        if not name.endswith("key.bias"):  # shifts the scores of all tokens alike, which softmax does not see
            assert parameter.grad.abs().max() > 1e-3, name


# the process


@contextmanager
def python(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        yield process


def test_as_a_process_with_json_alone_on_standard_output(folder: Path, tmp_path: Path) -> None:
    good, bad, weights = folder / "images" / "b.png", tmp_path / "bad.png", folder / "named.safetensors"
    bad.write_text("no image")
    with python(
        "-m", "mobileformer", "predict", good, bad, "--weights", weights, "--size", 64, "--json"
    ) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert json.loads(out)["results"][0]["predictions"][0]["class"] == expected(weights, good)[0][0]
    assert "bad.png: not an image" in err
    assert "Traceback" not in err


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, mobileformer.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'PIL', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    with python("-c", code) as process:
        out, _ = process.communicate(timeout=60)
    assert "predict" in out
    assert out.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_is_no_error() -> None:
    with python("-m", "mobileformer", "info", "--json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_leaves_cleanly() -> None:
    code = (
        "import sys, time\n"
        "from mobileformer.cli import bench, main\n"
        "def measure(*_, **__):\n"
        "    print('measuring', file=sys.stderr, flush=True)\n"
        "    time.sleep(600)\n"
        "bench.measure = measure\n"
        "sys.argv = ['mobileformer', 'bench']\n"
        "main()"
    )
    with python("-c", code) as process:
        assert process.stderr.readline() == "measuring\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "interrupted")


def test_json_is_strict() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        output.print_json({"value": float("nan")})
