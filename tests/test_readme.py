"""The texts: what they show runs, what they name exists, and every variable is in the table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_support import python

from mobileformer.cli import app

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"docs/{name}.md"
        for name in ("costs", "design", "ecosystem", "environment", "export", "gpu", "kernels", "triton")
    ),
]
NOT_IN_THE_REPOSITORY = ("torch/", "ATen/", ".venv/", "mf_kernels/_build.json")
TEXT = pytest.mark.parametrize("text", TEXTS)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(text), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_the_code_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    """As it stands, in a process of its own, where it may write files."""
    preamble = f"import os, torch\nos.chdir({str(tmp_path)!r})\ntorch.set_num_threads(1)\n"
    done = python(preamble + blocks("README.md", "python")[number], MF_KERNELS_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_the_readme_shows_code() -> None:
    assert len(blocks("README.md", "python")) == 3


@TEXT
def test_what_a_text_links_to_exists(text: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", read(text))
    missing = [t for t in targets if "://" not in t and not (ROOT / text).parent.joinpath(t).exists()]
    assert missing == []


@TEXT
def test_files_that_a_text_names_exist(text: str) -> None:
    """Anything with a slash between back quotes that looks like a file of the repository."""
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", read(text))
    ours = [name for name in named if not name.startswith(NOT_IN_THE_REPOSITORY)]
    assert [name for name in ours if not (ROOT / name).exists()] == []


@TEXT
def test_make_targets_and_commands_that_a_text_names_exist(text: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", read(text))) <= targets
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"\bmobileformer ([a-z]+)\b(?= |`)", code(text))) <= commands


def code(text: str) -> str:
    """What stands between back quotes and in blocks without a language."""
    return "\n".join([*re.findall(r"`[^`\n]+`", read(text)), *blocks(text, "")])


def test_every_variable_is_in_the_table() -> None:
    """Those of this package, in its sources and in the table of docs/environment.md, are the same."""
    name = re.compile(r"\bMF_KERNELS_[A-Z]+\b")
    sources = [ROOT / "setup.py", *ROOT.glob("m*/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    asked = {found for path in sources for found in name.findall(path.read_text(encoding="utf-8"))}
    assert asked == set(name.findall(read("docs/environment.md")))


def test_the_table_of_sizes_is_the_one_that_info_prints() -> None:
    from mobileformer import VARIANTS
    from mobileformer.race.published import MADDS

    rows = {
        f"| {name} | {config.num_parameters:,} | {MADDS[name]['fvcore']} M | {config.published_top1} % |"
        for name, config in VARIANTS.items()
    }
    assert {row.replace(",", " ") for row in rows} <= set(read("README.md").splitlines())


def ratios(row: str) -> list[str]:
    return re.findall(r"\| (\d+\.\d\dx)(?= \|)", row)


def test_the_speed_of_the_readme_is_what_the_page_of_benchmarks_says() -> None:
    """Every row of ratios, one for each network, is a column there; that page is checked against its result files."""
    tables = re.findall(r"^\| network \|.*\n(?:\|.*\n)+", read("docs/benchmarks.md"), re.MULTILINE)
    columns = [column for table in tables for column in zip(*map(ratios, table.splitlines()[2:]), strict=True)]
    told = [tuple(ratios(line)) for line in read("README.md").splitlines() if len(ratios(line)) == 7]
    assert len(told) == 10
    assert set(told) <= set(columns)


def test_the_readme_names_the_torch_that_is_pinned() -> None:
    pinned = re.search(r"^torch==(\d+\.\d+)", read("requirements/constraints.txt"), re.MULTILINE)
    assert pinned is not None
    assert f"tested with torch {pinned[1]}." in read("README.md")


def test_the_diagram_is_drawn_by_its_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = (ROOT / "docs/images/make_diagram.py").read_text(encoding="utf-8")
    (tmp_path / "make_diagram.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "make_diagram.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    drawn = (tmp_path / "architecture.png").read_bytes()
    assert drawn[:4] == b"\x89PNG"
    assert drawn[16:24] == (ROOT / "docs/images/architecture.png").read_bytes()[16:24]  # width and height
