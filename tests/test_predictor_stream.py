"""`Predictor` on many images: order, how far ahead it reads, threads; and its answers, which a file keeps."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import make_files
from tiny_support import tiny_variants

from mobileformer.inference import library
from mobileformer.prediction import Answer, AnswerFile, AnswerFileError, InputView, Picture, Predictor, run_key
from mobileformer.prediction.answers import answer_to

pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """A small network answers."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("stream"), "tiny")


def pictures(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8) for n in range(count)]


@pytest.mark.parametrize("path", ["engine", "fused"])
def test_neither_workers_nor_threads_of_the_engine_change_a_bit(folder: Path, path: Any) -> None:
    if path == "engine" and library.why_not() is not None:
        pytest.skip("no engine")
    images = pictures(7)
    first = None
    for threads, workers in ((1, 0), (2 if path == "engine" else 1, 0), (1, 3), (2 if path == "engine" else 1, 1)):
        predictor = Predictor(
            folder / "named.safetensors", size=32, path=path, threads=threads, workers=workers, batch=3, top_k=7
        )
        answers = list(predictor(images))
        assert [answer.name for answer in answers] == [f"image {n}" for n in range(7)]
        first = first or answers
        assert answers == first
    assert first is not None
    assert len({answer.classes for answer in first}) == 7  # seven images, seven answers: none stands for another


def test_order_is_kept_when_a_later_image_is_there_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(folder / "named.safetensors", size=32, threads=1, workers=3, batch=4)
    second, load = threading.Event(), predictor._load

    def late(picture: Picture) -> Any:
        if picture.name == "image 0":
            assert second.wait(60)
        found = load(picture)
        if picture.name == "image 1":
            second.set()
        return found

    monkeypatch.setattr(predictor, "_load", late)
    assert [answer.name for answer in predictor(pictures(5))] == [f"image {n}" for n in range(5)]


@pytest.mark.parametrize("workers", [0, 3])
def test_answers_come_before_the_last_image_is_read(folder: Path, workers: int) -> None:
    """However many images there are: what is taken of them is what the batches and the workers need."""
    taken, before = 0, set(threading.enumerate())

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        (image,) = pictures(1)
        while True:
            taken += 1
            yield image

    predictor = Predictor(folder / "named.safetensors", size=32, threads=1, workers=workers, batch=4, top_k=1)
    stream = predictor(endless())
    for _ in range(9):
        assert next(stream).error is None
    stream.close()  # type: ignore[attr-defined]
    assert 9 <= taken <= 12 + 4 + 2 * workers + 1
    started = set(threading.enumerate()) - before
    assert not [thread for thread in started if thread.name.startswith("ThreadPoolExecutor")]


def test_a_network_that_answers_with_nan_names_no_class(folder: Path) -> None:
    predictor = Predictor(folder / "named.safetensors", size=32, threads=1)
    network = predictor.network

    def broken(x: np.ndarray) -> Any:
        found = network.logits(x)
        found[1, 2] = np.nan
        return found

    predictor.network = dataclasses.replace(network, logits=broken)
    answers = list(predictor(pictures(3)))
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert answers[1].error == "image 1: the network's answer is not finite, so there is no class to name"


def test_callers_in_threads_of_their_own(folder: Path) -> None:
    predictor = Predictor(folder / "named.safetensors", size=32, threads=1, workers=1, batch=2)
    images = pictures(4)
    alone, together = list(predictor(images)), []
    callers = [threading.Thread(target=lambda: together.append(list(predictor(images)))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert together == [alone] * 3


# What comes out


def test_answers_are_ranked_and_ties_settled() -> None:
    answer = answer_to("x", np.array([1, 3, 3, 2, 900, -900], np.float32), labels=None, top_k=4)
    assert [row.index for row in answer.classes] == [4, 1, 2, 3]
    assert answer.classes[0].probability == 1
    logits = np.array([0.5, -1, 2], np.float32)
    answer = answer_to("x", logits, labels=["a", "b", "c"], top_k=9)
    shares = torch.from_numpy(logits).double().softmax(0).tolist()
    assert [(row.index, row.label) for row in answer.classes] == [(2, "c"), (0, "a"), (1, "b")]
    assert [row.probability for row in answer.classes] == pytest.approx([shares[2], shares[0], shares[1]], rel=1e-14)
    rows = [{"class": 2, "probability": answer.best.probability, "label": "c"}]
    assert answer_to("x", logits, labels=["a", "b", "c"], top_k=1).row() == {"image": "x", "predictions": rows}


def test_a_file_of_answers_by_hand(folder: Path, tmp_path: Path) -> None:
    predictor = Predictor(folder / "named.safetensors", size=32, threads=1)
    answers = list(predictor(pictures(3)))
    kept = AnswerFile(tmp_path / "out.jsonl", "abc")
    with pytest.raises(AnswerFileError, match="another process is writing to it"):
        AnswerFile(tmp_path / "out.jsonl", "abc")
    kept.add(answers[0])
    kept.add(Answer("bad", error="bad: empty"))
    kept.close()
    again = AnswerFile(tmp_path / "out.jsonl", "abc")
    assert again.answered == {"image 0": False, "bad": True}
    again.close()
    with pytest.raises(AnswerFileError, match="other weights, or with other options"):
        AnswerFile(tmp_path / "out.jsonl", "abd")


def test_files_of_answers_of_earlier_versions_are_gone_on_with(tmp_path: Path) -> None:
    """The key in each line is of the weights' bytes and the options, and stays what it was."""
    (tmp_path / "weights").write_bytes(b"weights")
    view = InputView(64, (0.5,), (0.25,), 0.875)
    assert run_key(tmp_path / "weights", view, ("a", "b"), 5, True, "float32") == "a765f2e08fd4"
