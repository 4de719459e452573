"""`Predictor` as a library: any image in, answers out, in order, as they come, whatever computes them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import NAMES, expected, make_files
from PIL import Image
from tiny_support import tiny_variants

import mf_kernels
import mobileformer
from mobileformer.data import ImageError, load_image
from mobileformer.inference import FoldedNetwork, fold, library
from mobileformer.prediction import (
    Answer,
    DeviceError,
    EngineError,
    Picture,
    PrecisionError,
    Predictor,
    is_folded,
)

pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")
needs_engine = pytest.mark.skipif(library.why_not() is not None, reason=f"no engine: {library.why_not()}")

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)  # not ImageNet's, which is what a file without them would get


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """A small network answers, where no other process has to know it."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command line's files, weights with a normalisation of their own, and the same folded."""
    return with_own_normalisation(make_files(tmp_path_factory.mktemp("predictor"), "tiny"))


def with_own_normalisation(folder: Path) -> Path:
    model = mobileformer.load_model(folder / "named.safetensors")
    told: dict[str, Any] = {"labels": NAMES, "mean": MEAN, "std": STD, "input_size": 64, "crop_fraction": 0.9}
    mobileformer.save_weights(model, folder / "own.safetensors", **told)
    fold(model, **told).save(folder / "folded.safetensors")
    return folder


@pytest.fixture
def photo(folder: Path) -> Path:
    return folder / "images" / "b.png"


def usual() -> str:
    return "engine" if library.why_not() is None else "fused"


def bits(answers: Iterator[Answer]) -> list[Answer]:
    return [dataclasses.replace(answer, name="") for answer in answers]


# What goes in


def test_whatever_an_image_comes_as_the_answer_is_the_same(folder: Path, photo: Path) -> None:
    predictor = Predictor(folder / "own.safetensors", threads=1, batch=1)
    with Image.open(photo) as image:
        image.load()
        array = np.asarray(image.convert("RGB"))
    index, probability = expected(folder / "own.safetensors", photo, 64, 0.9)[0]
    for images in (photo, str(photo), image, array, [photo], [image, array], np.stack([array, array]), iter([photo])):
        for answer in predictor(images):
            assert (answer.best.index, answer.best.label) == (index, NAMES[index])
            assert answer.best.probability == pytest.approx(probability, abs=1e-5)
    names = [answer.name for answer in predictor([photo, array, image, Picture("mine", array), Image.fromarray(array)])]
    assert names == [str(photo), "image 1", str(photo), "mine", "image 4"]
    assert [answer.name for answer in predictor.files([folder / "images"])] == [
        str(folder / "images" / name) for name in ("a.jpg", "b.png", "deep/c.webp")
    ]
    assert list(predictor([])) == list(predictor(np.zeros((0, 9, 9, 3), np.uint8))) == []


def test_grey_and_colour_go_where_they_are_wanted(folder: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (50, 60), dtype=np.uint8)
    for weights in ("grey.safetensors", "own.safetensors"):
        predictor = Predictor(folder / weights, size=32, threads=1, batch=1)
        same = bits(predictor([grey, grey[:, :, None], np.stack([grey] * 3, axis=2), Image.fromarray(grey)]))
        assert same[0].classes
        assert same == same[:1] * 4
        assert predictor.pixels(grey).shape == (32, 32, predictor.metadata.in_chans)


def test_what_is_no_image_is_refused_or_an_error_of_its_own(folder: Path, photo: Path, tmp_path: Path) -> None:
    predictor = Predictor(folder / "own.safetensors", threads=1, batch=2)
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [photo, tmp_path / "broken.png", photo, tmp_path, Picture("pattern", problem="nothing there"), photo]
    for workers in (0, 2):
        predictor.workers = workers
        answers = list(predictor(images))
        assert [answer.error is None for answer in answers] == [True, False, True, False, False, True]
        assert f"{tmp_path}/broken.png: not an image" in (answers[1].error or "")
        assert answers[4] == Answer("pattern", error="nothing there")
        assert answers[1].row() == {"image": f"{tmp_path}/broken.png", "error": answers[1].error}
        with pytest.raises(ValueError, match="not an image"):
            _ = answers[1].best
        for image, error, words in (
            (7, TypeError, "image 1: expected a path, a Pillow image or a uint8 array, got int"),
            (np.zeros((9, 9, 3)), TypeError, "expected an array of uint8, got float64"),
            (np.zeros((9, 9, 4), np.uint8), ValueError, r"\(H,W,3\), got shape \(9, 9, 4\)"),
        ):
            with pytest.raises(error, match=words):
                list(predictor([photo, image]))  # type: ignore[list-item]
    with pytest.raises(ImageError, match="0 x 9 pixels"):
        predictor.pixels(np.zeros((9, 0, 3), np.uint8))


# What computes


@needs_engine
@pytest.mark.parametrize("weights", ["own.safetensors", "folded.safetensors"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bytes_give_the_logits_of_floats(folder: Path, photo: Path, weights: str, precision: Any) -> None:
    """The engine normalises with the file's own mean and std, and that is what normalising outside gives."""
    predictor = Predictor(folder / weights, threads=1, precision=precision)
    assert (predictor.network.path, predictor.network.precision) == ("engine", precision)
    engine = predictor.network.engine
    assert engine is not None
    assert engine.dtype == precision
    noise = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    pixels = np.concatenate([predictor.pixels(photo)[None], noise, np.zeros((1, 64, 64, 3), np.uint8)])
    floats = (pixels / np.float32(255) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    floats = np.ascontiguousarray(floats.transpose(0, 3, 1, 2), dtype=np.float32)
    array = load_image(photo, size=64, mean=MEAN, std=STD, crop_fraction=0.9)
    np.testing.assert_array_equal(floats[0], array)
    got, wanted = predictor.logits(pixels), predictor.logits(floats)
    bound = 1e-5 if precision == "float32" else 2e-2
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()
    assert (got.argmax(1) == wanted.argmax(1)).all()
    imagenet = Predictor(folder / "named.safetensors", threads=1, precision=precision)
    assert np.abs(imagenet.logits(pixels) - wanted).max() > 3 * bound * np.abs(wanted).max()  # so that it would show


@needs_engine
def test_the_stream_hands_bytes_to_the_engine(folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(folder / "own.safetensors", threads=1, batch=2)
    seen: list[tuple[Any, ...]] = []
    logits = predictor.network.logits

    def watched(x: np.ndarray) -> Any:
        seen.append((x.dtype, x.shape))
        return logits(x)

    predictor.network = dataclasses.replace(predictor.network, logits=watched)
    list(predictor([photo] * 3))
    assert seen == [(np.uint8, (2, 64, 64, 3)), (np.uint8, (1, 64, 64, 3))]


@pytest.mark.parametrize("path", ["fused", "plain"])
def test_pytorch_gives_the_same_for_bytes_bit_by_bit(folder: Path, photo: Path, path: Any) -> None:
    predictor = Predictor(folder / "own.safetensors", path=path, threads=1)
    array = load_image(photo, size=64, mean=MEAN, std=STD, crop_fraction=0.9)[None]
    with mf_kernels.record_kernels() as record:
        logits = predictor.logits(predictor.pixels(photo)[None])
    assert bool(record.counts) == (path == "fused")
    np.testing.assert_array_equal(logits, predictor.logits(array))
    with torch.no_grad():
        model = mobileformer.load_model(folder / "own.safetensors", use_fused=path == "fused")
        np.testing.assert_array_equal(logits, model(torch.from_numpy(array)).numpy())


@needs_engine
def test_the_engine_and_no_kernel_of_pytorch_serves_by_default(folder: Path, photo: Path) -> None:
    predictor = Predictor(folder / "own.safetensors", threads=2)
    assert repr(predictor) == "Predictor(tiny, engine, float32, cpu)"
    assert predictor.network.model is None
    assert predictor.network.engine is not None
    assert predictor.network.engine.threads == 2
    with mf_kernels.record_kernels() as record:
        list(predictor(photo))
    assert record.counts == {}


@pytest.mark.parametrize("weights", ["named.safetensors", "published.pth.tar", "own.safetensors", "folded.safetensors"])
def test_any_weights_are_opened(folder: Path, photo: Path, weights: str) -> None:
    if weights == "folded.safetensors" and usual() != "engine":
        pytest.skip("no engine")
    assert is_folded(folder / weights) == (weights == "folded.safetensors")
    predictor = Predictor(folder / weights, size=64, threads=1, top_k=3)
    truth = folder / ("own.safetensors" if weights == "folded.safetensors" else weights)
    (answer,) = predictor(photo)
    assert predictor.network.path == usual()
    for row, (index, probability) in zip(
        answer.classes, expected(truth, photo, 64, predictor.view.crop_fraction), strict=False
    ):
        assert row.index == index
        assert row.label == (None if weights.startswith("published") else NAMES[index])
        assert row.probability == pytest.approx(probability, abs=1e-5)


@needs_engine
def test_a_folded_file_needs_no_torch(photo: Path, tmp_path: Path) -> None:
    folder = with_own_normalisation(make_files(tmp_path))
    code = (
        "import sys\n"
        "from mobileformer.prediction import Predictor\n"
        f"predictor = Predictor({str(folder / 'folded.safetensors')!r}, threads=1, workers=1)\n"
        f"print(next(predictor({str(photo)!r})).best.label, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "False"
    assert done.stdout.startswith(NAMES[expected(folder / "own.safetensors", photo, 64, 0.9)[0][0]])


def test_what_cannot_be_computed_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    weights, folded = folder / "own.safetensors", folder / "folded.safetensors"
    for options, error, words in (
        ({"path": "tpu"}, ValueError, "path: expected one of engine, fused, plain or None, got 'tpu'"),
        ({"precision": "int4"}, ValueError, "precision: expected one of float32, bfloat16, got 'int4'"),
        ({"path": "plain", "precision": "bfloat16"}, PrecisionError, "bfloat16 .* got path plain on cpu"),
        ({"path": "engine", "device": "cuda"}, DeviceError, "device cuda: the engine runs on the CPU"),
        ({"threads": 0}, ValueError, "threads: expected an integer of at least 1, or None, got 0"),
        ({"workers": -1}, ValueError, "workers: expected at least 0, got -1"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"labels": ["a"]}, ValueError, "labels: expected 7 names, one for each class, got 1"),
    ):
        with pytest.raises(error, match=words):
            Predictor(weights, **options)
    with pytest.raises(mobileformer.WeightsError, match="only the engine runs it, not fused"):
        Predictor(folded, path="fused")
    with pytest.raises(DeviceError, match="the engine runs on the CPU"):
        Predictor(folded, device="cuda")
    with pytest.raises(mobileformer.WeightsError, match="does not say what its input is normalised with"):
        Predictor(folder / "no_mean.safetensors")
    with pytest.raises(FileNotFoundError):
        Predictor(tmp_path / "none.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DeviceError, match=r"^device cuda: ."):
        Predictor(folder / "own.safetensors", device="cuda")


def test_without_the_engine_it_is_warned_who_computes(
    folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("the inference engine is not there: not built")

    monkeypatch.setattr("mobileformer.inference.engine.library", missing)
    monkeypatch.setattr("mobileformer.inference.engine.chosen_isa", lambda isa: isa)
    monkeypatch.delenv("MF_KERNELS_STRICT", raising=False)
    words = "fused PyTorch computes in place of the engine: engine: .*: not built"
    with pytest.warns(mf_kernels.KernelFallbackWarning, match=words):
        predictor = Predictor(folder / "own.safetensors", threads=1)
    assert predictor.network.path == "fused"
    assert next(predictor(photo)).best.index == expected(folder / "own.safetensors", photo, 64, 0.9)[0][0]
    options: dict[str, Any]
    for weights, options in (
        ("own.safetensors", {"path": "engine"}),
        ("own.safetensors", {"precision": "bfloat16"}),
        ("folded.safetensors", {}),
    ):
        with pytest.raises(EngineError, match=r"engine: .*not built"):
            Predictor(folder / weights, **options)
    monkeypatch.setenv("MF_KERNELS_STRICT", "1")
    with pytest.raises(EngineError, match="MF_KERNELS_STRICT=1 makes this an error"):
        Predictor(folder / "own.safetensors")


def test_no_warning_and_no_state_of_torch_is_left_behind(folder: Path, photo: Path) -> None:
    before = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = Predictor(folder / "own.safetensors", path="plain", threads=before + 1)
        list(predictor(photo))
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_a_folded_network_has_the_metadata_of_the_file(folder: Path) -> None:
    """What is folded while a file is opened keeps what the file says, so the engine can normalise with it."""
    if usual() != "engine":
        pytest.skip("no engine")
    engine = Predictor(folder / "own.safetensors", threads=1).network.engine
    assert engine is not None
    assert engine.metadata == FoldedNetwork.load(folder / "folded.safetensors").metadata


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_on_a_gpu(folder: Path, photo: Path, precision: Any, bound: float) -> None:
    predictor = Predictor(folder / "own.safetensors", device="cuda", precision=precision)
    assert (predictor.network.path, predictor.network.device) == ("fused", "cuda")
    index, probability = expected(folder / "own.safetensors", photo, 64, 0.9)[0]
    answer = next(predictor(photo))
    assert {row.index: row.probability for row in answer.classes}[index] == pytest.approx(probability, abs=bound)
