"""`mobileformer predict` on many images: answers stream, a stop keeps them, and a file of answers goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from cli_support import NAMES, expected, make_files, run, run_json

from mobileformer.cli import answers
from mobileformer.inference import library
from mobileformer.prediction import Picture, Predictor

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")

needs_engine = pytest.mark.skipif(library.why_not() is not None, reason=f"no engine: {library.why_not()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """Seven images, one of them broken."""
    small = (folder / "images" / "a.jpg").read_bytes()
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(small if number != 3 else b"no image")
    return tmp_path


def options(folder: Path, *more: object) -> tuple[object, ...]:
    return ("--weights", folder / "named.safetensors", "--size", 64, "--top-k", 2, *more)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_form_gives_the_same_answers(folder: Path, images: Path) -> None:
    document = run_json("predict", images, *options(folder), code=1)
    assert (document["failed"], len(document["results"])) == (1, 7)
    assert document["results"][3] == {"image": f"{images}/3.jpg", "error": f"{images}/3.jpg: " + _why(document)}
    streamed = run("predict", images, *options(folder, "--jsonl", "--workers", 3, "--batch", 2), code=1)
    assert [row["image"] for row in lines(streamed.stdout)] == [row["image"] for row in document["results"]]
    for one, other in zip(lines(streamed.stdout), document["results"], strict=True):
        for a, b in zip(one.get("predictions", ()), other.get("predictions", ()), strict=True):
            assert (a["class"], a["label"]) == (b["class"], b["label"])
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)
    table = run("predict", images, *options(folder), code=1)
    assert "1 of 7 failed" in table.stderr
    assert all(f"{number}.jpg" in table.stdout for number in (0, 1, 2, 4, 5, 6))


def _why(document: dict) -> str:
    return document["results"][3]["error"].split(": ", 1)[1]


def test_tables_come_while_it_runs(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_TABLE", 2)
    told = run("predict", images, *options(folder), code=1).stdout
    assert told.count("probability") == 4


def test_a_file_of_answers_goes_on_where_it_stopped(folder: Path, images: Path) -> None:
    out = images / "out.jsonl"
    summary = run_json("predict", images, *options(folder, "--output", out), code=1)
    assert (summary["answers"], summary["failed"], summary["output"]) == (7, 1, str(out))
    whole = out.read_text()
    assert [Path(row["image"]).name for row in lines(whole)] == [f"{number}.jpg" for number in range(7)]
    assert {row["run"] for row in lines(whole)} == {lines(whole)[0]["run"]}
    kept = whole.splitlines(keepends=True)
    for cut in (0, 1, 9, len(kept[0]) - 1, len(kept[0]), len(kept[0]) + len(kept[1]) + 20):
        out.write_text(whole[:cut])
        result = run("predict", images, *options(folder, "--output", out), code=1)
        assert out.read_text() == whole, cut
        assert ("goes on after" in result.stderr) == (cut >= len(kept[0]))
        assert "1 of 7 failed" in result.stderr
    run("predict", images, *options(folder, "--output", out), code=1)
    assert out.read_text() == whole


def test_a_file_that_holds_something_else_is_left_alone(folder: Path, images: Path) -> None:
    out = images / "out.jsonl"
    for content, words in (
        (b'{"precious": 1}\n', "line 1 is no answer"),
        (b"precious", "line 1 is no answer"),
        (b'{"image": "a", "run": "0", "predictions": []}\n', "other weights"),
        (b"[" * 100_000 + b"\n", "line 1 is no answer"),
        (b"\xff\xfe\n", "line 1 is no answer"),
    ):
        out.write_bytes(content)
        assert words in run_json("predict", images, *options(folder, "--output", out), code=1)["error"]
        assert out.read_bytes() == content
    out.unlink()
    run("predict", images, *options(folder, "--output", out), code=1)
    before = out.read_bytes()
    for other in (("--top-k", 3), ("--size", 96), ("--no-fused",), ("--weights", folder / "plain.safetensors")):
        failure = run_json("predict", images, *options(folder, "--output", out, *other), code=1)
        assert "other weights, or with other options" in failure["error"]
    assert out.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_two_do_not_write_into_one_file(folder: Path, images: Path) -> None:
    import fcntl

    with (images / "out.jsonl").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        failure = run_json("predict", images, *options(folder, "--output", images / "out.jsonl"), code=1)
    assert "another process" in failure["error"]


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C where the fifth image would be read."""
    load = Predictor._load

    def stop(self: Predictor, picture: Picture) -> object:
        if picture.name.endswith("5.jpg"):
            raise KeyboardInterrupt
        return load(self, picture)

    monkeypatch.setattr(Predictor, "_load", stop)


def test_a_stop_keeps_what_was_answered(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch)
    more = options(folder, "--batch", 2)
    document = run_json("predict", images, *more, code=130)
    assert [Path(row["image"]).name for row in document["results"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert (document["failed"], document["error"]) == (1, "interrupted")
    rows = lines(run("predict", images, *more, "--jsonl", code=130).stdout)
    assert len(rows) == 5
    assert rows[-1] == {"error": "interrupted"}
    assert "2.jpg" in run("predict", images, *more, code=130).stdout
    out = images / "out.jsonl"
    assert run_json("predict", images, *more, "--output", out, code=130) == {"error": "interrupted"}
    assert len(lines(out.read_text())) == 4
    monkeypatch.undo()
    run("predict", images, *more, "--output", out, code=1)
    assert len(lines(out.read_text())) == 7


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT, reads a pipe while it is written")
def test_answers_of_a_process_are_there_before_it_ends(folder: Path, images: Path) -> None:
    """The first line is read while the process still works on a later image."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mobileformer.cli import main\n"
        "from mobileformer.prediction import Predictor\n"
        "load = Predictor._load\n"
        "def slow(self, picture):\n"
        "    if picture.name.endswith('2.jpg'): time.sleep(600)\n"
        "    return load(self, picture)\n"
        "Predictor._load = slow\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "predict", images, *options(folder, "--json", "--batch", "1")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([*map(str, command)], env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        seen = ""
        while "1.jpg" not in seen:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.stdout.read(), process.stderr.read()  # pyright: ignore[reportOptionalMemberAccess]
        process.wait(timeout=60)
    assert process.returncode == 130
    assert len(json.loads(seen + out)["results"]) == 2
    assert err.splitlines()[-1] == "interrupted"


@needs_engine
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_folded_files_and_precisions(folder: Path, tmp_path: Path, precision: str) -> None:
    target, image = tmp_path / "folded.safetensors", folder / "images" / "b.png"
    run("convert", folder / "named.safetensors", target, "--fold")
    for weights in (target, folder / "named.safetensors"):
        more = ("--weights", weights, "--size", 64, "--threads", 1, "--precision", precision)
        report = run_json("predict", image, *more)
        assert (report["path"], report["precision"], report["device"]) == ("engine", precision, "cpu")
        index, probability = expected(folder / "named.safetensors", image)[0]
        first = report["results"][0]["predictions"][0]
        assert (first["class"], first["label"]) == (index, NAMES[index])
        assert first["probability"] == pytest.approx(probability, abs=1e-5 if precision == "float32" else 0.05)
    assert "--precision" in run("predict", image, *options(folder, "--precision", "bfloat16", "--fused"), code=2).stderr


def test_without_the_engine_it_is_said_who_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("the inference engine is not there: not built")

    monkeypatch.setattr("mobileformer.inference.engine.library", missing)
    monkeypatch.setattr("mobileformer.inference.engine.chosen_isa", lambda isa: isa)
    image = folder / "images" / "b.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run("predict", image, *options(folder, "--json"))
        assert json.loads(result.stdout)["path"] == "fused"
        assert "fused PyTorch computes in place of the engine" in result.stderr
        failure = run_json("predict", image, *options(folder, "--precision", "bfloat16"), code=1)
    assert "not built" in failure["error"]
