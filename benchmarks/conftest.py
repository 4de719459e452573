"""Options and the recorder of the benchmarks.

pytest benchmarks --benchmark-only                                    # everything but compiled whole networks
pytest benchmarks --benchmark-only --with-compile --save-results      # what is committed
pytest benchmarks --benchmark-only -k "dynamic_relu and backward"     # a part
"""

from __future__ import annotations

import os
from pathlib import Path

import harness
import pytest
import torch

RECORDER = pytest.StashKey[harness.Recorder]()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mobileformer benchmarks")
    group.addoption("--threads", type=int, default=1, help="CPU threads of PyTorch (1)")
    group.addoption("--device", choices=["cpu", "cuda"], help="one device (all that have kernels)")
    group.addoption(
        "--with-compile",
        action="store_true",
        help="torch.compile of the whole network too, 294m only: minutes to compile, not to run",
    )
    group.addoption(
        "--save-results",
        nargs="?",
        const=str(RESULTS),
        metavar="FOLDER",
        help="write the rows to FOLDER/<machine>-<threads>thread.json (benchmarks/results)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A row that is wrong fails before pytest-benchmark's turn comes, which it would report a second time.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    torch.set_num_threads(config.option.threads)
    config.stash[RECORDER] = harness.Recorder(config.option.threads, list(config.invocation_params.args))
    if not harness.devices(config.option.device):
        raise pytest.UsageError("no fused kernels here, nothing to measure: `python -m mf_kernels` says why")


def pytest_report_header(config: pytest.Config) -> list[str]:
    recorder = config.stash[RECORDER]
    lines = []
    for device in harness.devices(config.option.device):
        described = recorder.environment(device)
        lines.append(f"{device}: " + ", ".join(f"{name} {value}" for name, value in described.items()))
        if described["kernels_older_than_sources"]:
            lines.append(f"{device}: a source is newer than the compiled kernels; `make build` brings them up to date")
        load = os.getloadavg()[0]
        if load > 0.5:
            lines.append(f"{device}: other processes are running (load {load:.1f}); ratios hold, milliseconds less")
    return lines


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> harness.Recorder:
    return pytestconfig.stash[RECORDER]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for device in harness.devices(config.option.device):
        machine_info[f"mobileformer_{device}"] = config.stash[RECORDER].environment(device)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's long tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    for line in harness.summary(recorder.rows):
        terminalreporter.write_line(line)
    folder = config.option.save_results
    if folder is None:
        return
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not recorder.rows:
        terminalreporter.write_line("results: not saved, the run was cut off or measured nothing", red=True)
        return
    for path in recorder.save(Path(folder)):
        terminalreporter.write_line(f"results: {path}; python benchmarks/report.py renders it")
