"""Every command with everything a user can get wrong: one line, exit code 1 or 2, and JSON with --json."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_support import make_files
from detector_files import save_retinanet, small_variant
from PIL import Image
from safetensors.torch import save_file
from tiny_support import tiny_variants
from typer.testing import CliRunner

import mobileformer
from mobileformer.cli import app, output

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning"),
    pytest.mark.skipif(os.name != "posix", reason="FIFOs, devices and names in any bytes"),
]


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Files of a small network: it is all the same to those that are wrong."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Good files, and in bad/ one of each kind that is wrong."""
    folder = make_files(tmp_path_factory.mktemp("wrong"), "tiny")
    (folder / "labels.txt").write_text("\n".join("abcdefg"))
    for split in ("train", "val"):
        for name in ("one", "two"):
            (folder / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red" if name == "one" else "blue").save(
                folder / "data" / split / name / "0.png"
            )
    bad = folder / "bad"
    bad.mkdir()
    (bad / "folder").mkdir()
    (bad / "empty").touch()
    (bad / "text").write_text("no such thing, but some words\n" * 9)
    (bad / "other").write_bytes((folder / "images" / "a.jpg").read_bytes()[:700])
    save_file({"something": torch.zeros(3)}, bad / "foreign.safetensors")
    os.mkfifo(bad / "fifo")
    (bad / "locked").write_text("secret")
    (bad / "locked").chmod(0)
    with small_variant():
        save_retinanet(folder / "detector.safetensors")
        yield folder


BAD_FILES = (
    "missing",
    "folder",
    "empty",
    "text",
    "other",
    "fifo",
    "locked",
    "l" * 300,
    os.fsdecode(b"latin-\xe9"),
    "a\nb",
)

READS = {
    "predict image": ("predict", "BAD", "--weights", "WEIGHTS"),
    "predict weights": ("predict", "IMAGE", "--weights", "BAD"),
    "predict labels": ("predict", "IMAGE", "--weights", "WEIGHTS", "--labels", "BAD"),
    "detect image": ("detect", "BAD", "--weights", "DETECTOR", "--out", "NEW"),
    "detect weights": ("detect", "IMAGE", "--weights", "BAD", "--out", "NEW"),
    "evaluate data": ("evaluate", "BAD", "--weights", "WEIGHTS"),
    "evaluate weights": ("evaluate", "DATA", "--weights", "BAD"),
    "evaluate labels": ("evaluate", "DATA", "--weights", "WEIGHTS", "--labels", "BAD"),
    "visualize image": ("visualize", "BAD", "--weights", "WEIGHTS", "--out", "NEW.png"),
    "visualize weights": ("visualize", "IMAGE", "--weights", "BAD", "--out", "NEW.png"),
    "convert": ("convert", "BAD", "NEW.safetensors"),
    "convert labels": ("convert", "WEIGHTS", "NEW.safetensors", "--labels", "BAD"),
    "export": ("export", "NEW.onnx", "--weights", "BAD"),
    "info": ("info", "BAD"),
    "bench": ("bench", "--variant", "26m", "--image", "BAD", "--no-compile", "--no-runtimes"),
    "train data": ("train", "BAD", "--recipe", "26m", "--output", "NEW"),
    "train recipe": ("train", "DATA", "--recipe", "BAD", "--output", "NEW"),
    "train weights": (
        *("train", "DATA", "--recipe", "26m", "--output", "NEW", "--weights", "BAD"),
        *("--set", "global_batch=2", "--set", "micro_batch=2"),
    ),
}

WRITES = {
    "predict": ("predict", "IMAGE", "--weights", "WEIGHTS", "--size", "32", "--output", "OUT.jsonl"),
    "evaluate": ("evaluate", "DATA", "--weights", "TWO", "--size", "32", "--confusion", "OUT.png"),
    "visualize": ("visualize", "IMAGE", "--weights", "WEIGHTS", "--size", "32", "--out", "OUT.png"),
    "visualize page": ("visualize", "IMAGE", "--weights", "WEIGHTS", "--size", "32", "--html", "OUT.html"),
    "convert": ("convert", "WEIGHTS", "OUT.safetensors", "--force"),
    "convert published": ("convert", "WEIGHTS", "OUT.pth", "--force"),
    "convert folded": ("convert", "WEIGHTS", "OUT.safetensors", "--fold", "--force"),
    "export": (
        "export",
        "OUT.pt2",
        "--to",
        "torch-export",
        "--weights",
        "WEIGHTS",
        "--size",
        "64",
        "--force",
        "--no-check",
    ),
}

USAGE = [
    ("nonsense",),
    ("predict",),
    ("predict", "IMAGE", "--nonsense"),
    ("predict", "IMAGE", "--device", "tpu"),
    ("predict", "IMAGE", "--device", "cuda:"),
    ("predict", "IMAGE", "--device", "cuda:-1"),
    ("predict", "IMAGE", "--device", ""),
    ("predict", "IMAGE", "--weights", "WEIGHTS", "--precision", "float8"),
    ("predict", "IMAGE", "--weights", "WEIGHTS", "--precision", "bfloat16", "--no-fused"),
    ("predict", "IMAGE", "--jsonl", "--output", "NEW.jsonl"),
    ("predict", "IMAGE", "--output", "NEW.txt"),
    ("detect",),
    ("detect", "IMAGE", "--top-k", "1"),
    ("detect", "IMAGE", "--weights", "DETECTOR", "--device", "tpu"),
    ("train", "DATA"),
    ("train", "DATA", "--recipe", "26m", "--output", "NEW", "--device", "gpu"),
    ("evaluate", "DATA", "--device", "cuda:x"),
    ("evaluate", "DATA", "--weights", "WEIGHTS", "--compare", "--path", "plain"),
    ("evaluate", "DATA", "--weights", "WEIGHTS", "--confusion", "NEW.jpg"),
    ("evaluate", "DATA", "--weights", "WEIGHTS", "--curves", "NEW.png"),
    ("evaluate", "DATA", "--weights", "DETECTOR", "--confusion", "NEW.png"),
    ("evaluate", "DATA", "--weights", "DETECTOR", "--task", "segmentation"),
    ("visualize", "IMAGE", "--weights", "WEIGHTS", "--out", "NEW.jpg"),
    ("visualize", "IMAGE", "--weights", "DETECTOR", "--html", "NEW.html"),
    ("bench", "--variant", "1m"),
    ("bench", "--device", "cuda:999999"),
    ("bench", "--dtype", "float16"),
    ("bench", "--train", "--dtype", "bfloat16"),
    ("bench", "--profile", "--train", "--batch", "4"),
    ("convert", "WEIGHTS", "NEW.onnx"),
    ("convert", "WEIGHTS", "NEW.safetensors", "--variant", "295m"),
    ("convert", "WEIGHTS", "NEW.pth", "--fold"),
    ("export", "NEW.onnx", "--weights", "WEIGHTS", "--to", "tflite"),
    ("demo", "--variant", "é"),
    ("info", "WEIGHTS", "WEIGHTS"),
    ("--nonsense",),
]

FAILURES = [
    ("predict", "bad/folder", "--weights", "WEIGHTS"),  # an empty folder
    ("predict", "IMAGE", "--weights", "bad/foreign.safetensors"),
    ("predict", "IMAGE", "--weights", "DETECTOR"),
    ("detect", "IMAGE", "--weights", "WEIGHTS", "--out", "NEW"),
    ("detect", "IMAGE", "--weights", "bad/foreign.safetensors", "--out", "NEW"),
    ("detect", "IMAGE", "--weights", "DETECTOR", "--device", "mps", "--out", "NEW"),
    ("detect", "IMAGE", "--weights", "DETECTOR", "--size", "8192", "--batch", "65536", "--out", "NEW"),
    ("evaluate", "DATA", "--weights", "DETECTOR"),  # no boxes
    ("info", "bad/foreign.safetensors"),
    ("convert", "bad/foreign.safetensors", "NEW.safetensors"),
    ("evaluate", "DATA", "--weights", "WEIGHTS"),  # seven classes for two
    ("train", "DATA", "--recipe", "nonsense", "--output", "NEW"),
    ("train", "DATA", "--recipe", "26m", "--output", "NEW", "--set", "nonsense=1"),
    ("train", "DATA", "--recipe", "26m", "--output", "NEW", "--set", "nonsense"),
    ("train", "DATA", "--recipe", "26m", "--output", "NEW", "--set", "epochs=1" + 5000 * "0"),
    ("predict", "IMAGE", "--weights", "WEIGHTS", "--device", "mps"),
    ("predict", "IMAGE", "--weights", "WEIGHTS", "--size", "8192", "--batch", "65536"),
    ("bench", "--size", "8192", "--batch", "65536"),
    ("convert", "WEIGHTS", "WEIGHTS"),
    ("visualize", "IMAGE", "--weights", "bad/foreign.safetensors", "--out", "NEW.png"),
]

NUMBERS = {
    "predict": ("--top-k", "--size", "--batch", "--threads", "--workers"),
    "detect": ("--threshold", "--size", "--batch", "--threads", "--workers"),
    "evaluate": ("--size", "--batch", "--threads", "--workers", "--max-broken"),
    "train": ("--threads", "--workers", "--max-broken", "--save-minutes"),
    "visualize": ("--size",),
    "bench": ("--size", "--batch", "--threads", "--repeats"),
    "export": ("--size", "--opset"),
    "demo": ("--threads", "--repeats"),
}
NEEDED = {
    "predict": ("IMAGE", "--weights", "WEIGHTS"),
    "detect": ("IMAGE", "--weights", "DETECTOR", "--out", "NEW"),
    "evaluate": ("DATA", "--weights", "WEIGHTS"),
    "train": ("DATA", "--recipe", "26m", "--output", "NEW"),
    "visualize": ("IMAGE", "--weights", "WEIGHTS", "--out", "NEW.png"),
    "bench": ("--variant", "26m"),
    "export": ("NEW.onnx", "--weights", "WEIGHTS"),
    "demo": ("--variant", "26m", "--sheet", "NEW.png"),
}


def filled(arguments: tuple[str, ...], folder: Path, new: Path, bad: Path | str = "") -> list[str]:
    names = {
        "WEIGHTS": folder / "named.safetensors",
        "DETECTOR": folder / "detector.safetensors",
        "IMAGE": folder / "images" / "b.png",
        "DATA": folder / "data",
        "TWO": folder / "two.safetensors",
        "BAD": bad,
    }
    done = []
    for argument in arguments:
        if argument.startswith("NEW"):
            argument = str(new / argument)
        elif argument.startswith("bad/"):
            argument = str(folder / argument)
        done.append(str(names.get(argument, argument)))
    return done


def refused(arguments: list[str], *codes: int, with_json: bool = True) -> str:
    """The one line that is told, which --json has as well."""
    plain = CliRunner().invoke(app, arguments)
    told = [line for line in plain.stderr.splitlines() if not line.endswith(": writing")]  # export says what it does
    assert plain.exit_code in (codes or (1,)), (arguments, plain.output)
    assert len(told) == 1, (arguments, plain.stderr)
    assert told[0].startswith("error: "), told
    assert "internal error" not in told[0]
    assert not any(word in told[0] for word in ("Traceback", "weights_only", "\x1b")), told
    assert plain.stdout == "" or "--jsonl" in arguments, arguments
    if with_json and (
        plain.exit_code == 2 or arguments[0] not in ("predict", "detect")
    ):  # which are quick; the others have done their work by then
        answer = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
        assert answer["error"]
    return told[0]


@pytest.mark.parametrize("which", READS)
def test_files_that_cannot_be_read(folder: Path, tmp_path: Path, which: str) -> None:
    for name in BAD_FILES:
        if name == "locked" and os.geteuid() == 0:
            continue  # root reads it
        told = refused(filled(READS[which], folder, tmp_path, folder / "bad" / name), with_json=name == "text")
        assert "bad/" in told, told
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize("which", WRITES)
def test_files_that_cannot_be_written(folder: Path, tmp_path: Path, which: str) -> None:
    if not (folder / "two.safetensors").exists():
        model = mobileformer.Model("tiny", num_classes=2)
        mobileformer.save_weights(model, folder / "two.safetensors", labels=["one", "two"])
    (option,) = (argument for argument in WRITES[which] if argument.startswith("OUT"))
    suffix = option.removeprefix("OUT")
    (tmp_path / f"taken{suffix}").mkdir()
    for name, words in ((f"no/where{suffix}", "folder"), (f"taken{suffix}", "")):
        arguments = filled(WRITES[which], folder, tmp_path)
        arguments[arguments.index(option)] = str(tmp_path / name)
        told = refused(arguments, with_json=False)
        assert words in told
        assert f"{tmp_path}" in told
    with no_room():
        arguments[arguments.index(str(tmp_path / name))] = str(tmp_path / f"large{suffix}")
        told = refused(arguments, with_json=which != "export")  # which takes ten seconds each time
    assert "File too large" in told or "No space left" in told
    assert f"{tmp_path}/large" in told
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] in ([f"taken{suffix}"], [])


@contextmanager
def no_room() -> Iterator[None]:
    """As on a full disk: no file may grow beyond some bytes. (A pipe is none, and pytest's own files are small.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage(folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused(filled(arguments, folder, tmp_path), 2)


@pytest.mark.parametrize("arguments", FAILURES, ids=lambda arguments: " ".join(arguments)[:60])
def test_what_does_not_fit(folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused(filled(arguments, folder, tmp_path))


@pytest.mark.parametrize("command", NUMBERS)
def test_numbers_out_of_range(folder: Path, tmp_path: Path, command: str) -> None:
    for option in NUMBERS[command]:
        for value in ("-1", "1e20", "nan", "inf", "abc", "", "1" + 30 * "0"):
            if (option, value) in (
                ("--top-k", "1" + 30 * "0"),
                ("--max-broken", "1" + 30 * "0"),
            ):
                continue  # as good as never, all, any number
            told = refused(
                [command, *filled(NEEDED[command], folder, tmp_path), option, value], 2, with_json=value == "nan"
            )
            assert option in told


def test_what_nobody_could_cause_is_told_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A fault of the package: one line as well, and where it is on request."""
    raised: list[Exception] = [ZeroDivisionError("of\nours")]

    def fail() -> None:
        raise raised[-1]

    monkeypatch.setattr("mobileformer.cli.info.describe", fail)
    monkeypatch.delenv("MOBILEFORMER_DEBUG", raising=False)
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: internal error: ZeroDivisionError: of: ours (")
    assert len(result.stderr.splitlines()) == 1
    assert "ZeroDivisionError" in json.loads(result.stdout)["error"]
    monkeypatch.setenv("MOBILEFORMER_DEBUG", "1")
    assert "in fail" in CliRunner().invoke(app, ["info"]).stderr
    monkeypatch.delenv("MOBILEFORMER_DEBUG")
    for error, words in (
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
        (RecursionError(), "the input is nested too deeply"),
        (OSError(28, "No space left on device", "there"), "there: No space left on device"),
        (output.CommandError("a\n  b\n  c"), "a: b; c"),
    ):
        raised.append(error)
        assert refused(["info"]).startswith(f"error: {words}")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("mf_kernels", ("--nonsense",)),
        ("mf_kernels", ("file",)),
        ("mobileformer.timm", ()),
        ("mobileformer.timm", ("--nonsense",)),
        ("mobileformer.timm", ("bad/missing",)),
        ("mobileformer.timm", ("bad/folder",)),
        ("mobileformer.timm", ("bad/fifo",)),
    ],
)
def test_the_other_modules(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    arguments: tuple[str, ...],
) -> None:
    if module.endswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("without timm")
    monkeypatch.setattr(sys, "argv", [module, *filled(arguments, folder, folder)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # runpy warns where another test has it
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("error: ")
    assert told.out == ""
