"""The command line as a whole: what it tells of itself, wrong usage, and how the process behaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_support import expected, make_files, run, run_json

import mobileformer
from mobileformer.cli import output
from mobileformer.inference import library

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("cli"))


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
    engine = report["engine"]
    assert engine["available"] or engine["reason"]
    assert engine["isa"] == (engine["runnable"][-1] if engine["available"] else None)
    assert set(engine["runnable"]) <= set(engine["compiled"])


def test_info_tells_what_keeps_the_engine_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "mobileformer._engine was not built (no C++ compiler)"))
    assert run_json("info")["engine"] == {
        "available": False,
        "reason": "mobileformer._engine was not built (no C++ compiler)",
        "isa": None,
        "runnable": [],
        "compiled": [],
        "built_with": None,
    }
    assert "mobileformer._engine was not built (no C++ compiler)" in run("info").stdout


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
        "Inference engine",
        "threads",
    ):
        assert words in told
    assert max(map(len, told.splitlines())) <= 80
    assert told.count("interpreter: set TRITON_INTERPRET=1") <= 1  # not once for every operator


@pytest.mark.parametrize("variant", ["26m", "294m"])
def test_the_stated_multiply_adds_are_those_of_the_model(variant: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from mobileformer.race.published import MADDS

    with torch.device("meta"):
        model = mobileformer.Model(variant, use_fused=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e6 == MADDS[variant]["conv+linear+matmul"]


def test_every_variant_has_its_numbers() -> None:
    from mobileformer.race.published import COUNTERS, MADDS

    assert list(MADDS) == list(mobileformer.VARIANTS)
    for name, row in MADDS.items():
        assert set(row) == set(COUNTERS)
        assert row["fvcore"] == pytest.approx(float(name.removesuffix("m")), rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "in.pth", "out.onnx"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_is_not_silently_replaced(folder: Path) -> None:
    weights = folder / "plain.safetensors"
    for arguments in (
        ("predict", "x.png", "--weights", weights),
        ("bench", "--variant", "26m", "--no-compile"),
    ):
        assert "no CUDA device" in run_json(*arguments, "--device", "cuda", code=1)["error"]


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
    with python("-m", "mobileformer", "predict", good, bad, "--weights", weights, "--size", 64, "--json") as process:
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
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs are born without
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


@pytest.mark.skipif(os.name != "posix", reason="streams of a POSIX shell")
@pytest.mark.parametrize(
    ("streams", "words"),
    [(">&-", "standard output is closed"), (">/dev/full", "standard output: No space left on device"), ("2>&-", "")],
)
@pytest.mark.parametrize("module", ["mobileformer --version", "mf_kernels"])
def test_standard_output_that_takes_nothing(streams: str, words: str, module: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m {module} {streams}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == (f"error: {words}\n" if words else "")
    assert done.returncode == (1 if words else 0)
    assert bool(done.stdout) != bool(words)


def test_names_that_the_encoding_lacks_are_escaped(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mobileformer.cli import app

    image = tmp_path / os.fsdecode(b"caf\xe9\n.png")
    image.write_bytes((folder / "images" / "b.png").read_bytes())
    arguments = ["predict", str(image), "--weights", str(folder / "named.safetensors"), "--size", "64", "--top-k", "7"]
    result = CliRunner(charset="ascii").invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "\\udce9\\n.png" in "".join(result.stdout.split())
    assert "\\xe9l\\xe9phant" in result.stdout
    result = CliRunner(charset="ascii").invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["results"][0]["image"] == str(image)
