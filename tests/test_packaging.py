"""What a stranger gets: the source archive, the wheel, and the package where nothing can be compiled.

The fixture `wheel` is built where there is nothing but what pyproject.toml asks for, linked from here: an isolated
build would install a torch of its own, which takes longer than the rest of this file. The environments that wheels are
installed into see this interpreter's torch through a .pth file, or its numpy alone through a link.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_support import golden_file, recipe_image, recipe_model
from packaging.requirements import Requirement

from mobileformer.inference import fold

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = str(ROOT / "requirements" / "constraints.txt")
FLAGS = "-DMF_BASELINE_ONLY -O0"
CPU, CUDA, ENGINE = "mf_kernels._cpu", "mf_kernels._cuda", "mobileformer._engine"

# Runs in an environment that holds nothing but the wheel and torch.
PROBE = """
import json, warnings
import torch, mf_kernels, mobileformer
torch.set_num_threads(1)
torch.manual_seed(0)
x, q, theta = torch.randn(2, 12, 7, 5), torch.randn(2, 3, 12), torch.randn(2, 24)
with warnings.catch_warnings(record=True) as caught, mf_kernels.record_kernels() as record:
    warnings.simplefilter("always")
    again = mf_kernels.mobile_to_former(x, q)
    results = [mf_kernels.mobile_to_former(x, q), mf_kernels.dynamic_relu(x, theta)]
truths = [mf_kernels.reference.mobile_to_former(x, q), mf_kernels.reference.dynamic_relu(x, theta)]
print(json.dumps({
    "where": mf_kernels.__file__,
    "counts": record.counts,
    "difference": max(float((a - b).abs().max()) for a, b in zip(results, truths)),
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
    "features": list(mobileformer.Model("26m").eval().forward_features(torch.zeros(1, 3, 64, 64))[0].shape),
}))
"""

# Runs in an environment that holds nothing but the wheel and numpy.
PROBE_ENGINE = """
import json, sys
import numpy as np
import mobileformer
from mobileformer.inference import Engine
engine = Engine(sys.argv[1])
np.save(sys.argv[3], engine(np.load(sys.argv[2])))
try:
    import torch
    sys.exit("torch is here: this environment proves nothing")
except ImportError:
    pass
loaded = {"mf_kernels", "safetensors", "typer", "PIL", "rich", "tqdm"} & set(sys.modules)
print(json.dumps({"where": mobileformer.__file__, "isa": engine.isa, "loaded": sorted(loaded)}))
"""


def run(*command: str | Path, cwd: Path = Path(sys.prefix), **environment: str) -> subprocess.CompletedProcess[str]:
    """Away from the source tree, so that nothing is imported from it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MF_KERNELS_") and k != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def must_run(*command: str | Path, cwd: Path = Path(sys.prefix), **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def build_wheel(
    source: Path, folder: Path, *options: str, python: Path = Path(sys.executable), **environment: str
) -> Path:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "wheel",
        "--no-deps",
        "--wheel-dir",
        folder,
        *options,
        source,
    )
    must_run(*pip, PIP_CONSTRAINT=CONSTRAINTS, PIP_BUILD_CONSTRAINT=CONSTRAINTS, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def probe(programs: Path) -> dict:
    """What PROBE saw; its last line, since warnings may stand before it."""
    return json.loads(must_run(programs / "python", "-c", PROBE).splitlines()[-1])


def libraries(wheel: Path) -> list[str]:
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))


def build_record(wheel: Path) -> dict:
    return json.loads(zipfile.ZipFile(wheel).read("mf_kernels/_build.json"))


def kept_files() -> list[str]:
    """What belongs to the project: what git has, or in an unpacked archive what that has."""
    if (ROOT / ".git").exists():
        listed = must_run("git", "ls-files", "-z", "--cached", cwd=ROOT).split("\0")
    else:
        listed = (ROOT / "mobileformer.egg-info" / "SOURCES.txt").read_text().splitlines()
    return [name for name in listed if (ROOT / name).is_file() and ".egg-info" not in name]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a tree with an in-place build in it: its products must stay out."""
    tree = tmp_path_factory.mktemp("tree") / "copy"
    for name in kept_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    (tree / "mf_kernels" / "_cpu.so").write_text("the library of another machine")
    (tree / "mf_kernels" / "_build.json").write_text("{}")
    out = tmp_path_factory.mktemp("sdist")
    must_run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive unpacked: what a build without git and without this tree has to do with."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One instruction set, hardly optimised: the libraries that are tested in place have all of them."""
    python, packages = fresh_environment(tmp_path_factory.mktemp("build"))
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for name in with_what_they_need(asked):
        link(name, packages, python.parent)
    tools = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = {"MF_KERNELS_CPU": "1", "MAX_JOBS": "2", "CXXFLAGS": FLAGS, "PATH": tools}
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), "--no-build-isolation", python=python, **environment)


def with_what_they_need(requirements: list[str]) -> set[str]:
    """Names of the distributions, and of all that those require here. The versions that are here have to fit."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), str(requirement)
        if requirement.name not in found:
            found.add(requirement.name)
            waiting += map(Requirement, metadata.requires(requirement.name) or [])
    return found


def link(name: str, packages: Path, programs: Path) -> None:
    """What a distribution has in this environment, in another one as well."""
    distribution = metadata.distribution(name)
    for file in distribution.files or []:
        if file.parts[0] != "..":
            target, source = packages / file.parts[0], distribution.locate_file(file.parts[0])
        elif file.parts[-2] == "bin":
            target, source = programs / file.name, distribution.locate_file(file)
        else:
            continue
        if not target.exists():
            target.symlink_to(Path(str(source)).resolve())


def fresh_environment(folder: Path) -> tuple[Path, Path]:
    """(its interpreter, its folder of packages): an environment without anything, not even pip."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    return python, Path(must_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def install_wheel(python: Path, built: Path) -> None:
    must_run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built)


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Installs a wheel into a fresh environment that has torch and gives that environment's folder of programs."""

    def into_fresh_environment(built: Path) -> Path:
        python, packages = fresh_environment(tmp_path_factory.mktemp("fresh"))
        (packages / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
        install_wheel(python, built)
        return python.parent

    return into_fresh_environment


def without_compiler(folder: Path) -> dict[str, str]:
    """A PATH on which there is Python and nothing else."""
    (folder / "python").symlink_to(sys.executable)
    return {"PATH": str(folder), "CC": "", "CXX": ""}


def failing_compiler(folder: Path) -> dict[str, str]:
    """A compiler that tells its version and compiles nothing."""
    program = folder / "c++"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "broken c++ 1.0" && exit 0\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"CXX": str(program)}


def test_sdist_holds_every_source_and_no_product(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob("m*/**/*.py")}
    assert any(name.startswith("csrc/cpu/") for name in wanted)
    assert wanted | {"LICENSE", "README.md", "pyproject.toml", "setup.py", "mf_kernels/py.typed"} <= names
    assert set(kept_files()) <= names, "MANIFEST.in leaves something out"
    assert [name for name in names if name.endswith((".so", "_build.json", ".pyc"))] == []


def test_the_tests_of_the_archive_are_whole(source: Path) -> None:
    """Collected where there is nothing but the archive: a support file that is missing is an ImportError."""
    found = must_run(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
        *(f"tests/{name}.py" for name in ("test_cli_weights", "test_engine", "test_grids", "test_weights")),
        cwd=source, PYTHONPATH=str(source),
    )  # fmt: skip
    assert "tests/test_weights.py::test_published_checkpoint" in found


def test_wheel_holds_what_was_built_and_tells_how(wheel: Path) -> None:
    """The kernels serve every Python, the engine the one it was built for, and so does the wheel."""
    record = build_record(wheel)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert libraries(wheel) == ["mf_kernels/_cpu.so", f"mobileformer/_engine{suffix}"]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.split("-")[2:4] == [python, python]
    assert not wheel.name.endswith("any.whl")
    for library in (CPU, ENGINE):
        row = record["libraries"][library]
        assert row["built"]
        assert row["compiler"]
        assert not any(flag.startswith("-march") or flag == "-ffast-math" for flag in row["flags"])
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in record["libraries"][CPU]["flags"]
    assert [record["libraries"][name]["flags"][-1] for name in (CPU, ENGINE)] == ["-O0", "-O0"]  # the builder's own
    assert record["torch"].split("+")[0] == pinned("torch")


def test_wheel_runs_its_kernels_in_a_fresh_environment(wheel: Path, install: Callable[[Path], Path]) -> None:
    programs = install(wheel)
    seen = probe(programs)
    assert Path(seen["where"]).is_relative_to(programs.parent)
    assert seen["difference"] < 1e-5
    assert seen["warnings"] == []
    assert seen["counts"], "no kernel counted a call"
    assert all(":native:cpu:" in kernel for kernel in seen["counts"])
    assert "26m" in must_run(programs / "mobileformer", "info", "--json")


def test_the_engine_runs_with_numpy_alone(wheel: Path, tmp_path: Path) -> None:
    """Golden logits where there is no torch, nor anything else that the package asks for."""
    python, packages = fresh_environment(tmp_path / "fresh")
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        (packages / part.name).symlink_to(part)
    install_wheel(python, wheel)
    network, images, logits = tmp_path / "26m.safetensors", tmp_path / "images.npy", tmp_path / "logits.npy"
    fold(recipe_model("26m")).save(network)
    np.save(images, recipe_image(2, 224, 224, seed=1).float().numpy())
    seen = json.loads(must_run(python, "-c", PROBE_ENGINE, network, images, logits).splitlines()[-1])
    assert Path(seen["where"]).is_relative_to(packages)
    assert seen["loaded"] == []
    assert np.abs(np.load(logits) - golden_file("26m")["logits_224"]).max() < 2e-4


def test_without_a_compiler_the_package_is_pure_and_runs_on_the_reference(
    source: Path, tmp_path: Path, install: Callable[[Path], Path]
) -> None:
    (tmp_path / "bin").mkdir()
    environment = without_compiler(tmp_path / "bin")
    wheel = build_wheel(source, tmp_path / "out", "--no-build-isolation", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    assert "no C++ compiler" in build_record(wheel)["libraries"][CPU]["reason"]

    programs = install(wheel)
    seen = probe(programs)
    assert Path(seen["where"]).is_relative_to(programs.parent)
    assert seen["difference"] == 0
    assert seen["counts"] == {"mobile_to_former:reference": 2, "dynamic_relu:reference": 1}
    assert [w.partition(":")[0] for w in seen["warnings"]] == ["KernelFallbackWarning"]  # once for all
    assert all("no C++ compiler" in w for w in seen["warnings"])


def test_a_compiler_that_fails_leaves_a_pure_package_and_a_loud_warning(source: Path, tmp_path: Path) -> None:
    environment = failing_compiler(tmp_path)
    setup = (sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path / "out")
    told = must_run(*setup, cwd=source, **environment)
    assert "WARNING: mf_kernels._cpu does not compile with broken c++ 1.0" in told
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        (
            {"MF_KERNELS_CPU": "1", "CXX": "/nowhere/c++"},
            "MF_KERNELS_CPU=1: mf_kernels._cpu cannot be built: no C++",
        ),
        ({"MF_KERNELS_CPU": "yes"}, "MF_KERNELS_CPU: expected auto, 1 or 0, got 'yes'"),
    ],
)
def test_a_build_that_cannot_do_what_was_asked_fails_and_says_why(
    source: Path, tmp_path: Path, switches: dict[str, str], expected: str
) -> None:
    done = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, cwd=source, **switches)
    assert done.returncode != 0
    assert expected in done.stdout


def test_a_compiler_of_several_words_is_one(source: Path, tmp_path: Path) -> None:
    """As with a cache before it. This one compiles nothing of what it is given, which is quick."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    cache.write_text(
        '#!/bin/sh\necho "$*" >> "$CALLS"\n'
        'case " $* " in *" -c "*) ;; *" -o "*|*" --version "*) exec "$@";; *) exit 127;; esac\n'
        'compiler=$1; while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo > "$2.cpp"; '
        'exec "$compiler" -fPIC -c "$2.cpp" -o "$2"; fi; shift; done\n'
    )
    cache.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "o"]
    wanted = {"CXX": f"{cache} g++", "MF_KERNELS_CPU": "1", "MF_KERNELS_CUDA": "0", "CALLS": str(log)}
    told = must_run(*command, cwd=source, **wanted)
    assert "mf_kernels._cpu       built with g++" in told
    assert sum(" -c " in f" {line} " for line in log.read_text().splitlines()) >= 10
    assert (tmp_path / "lib" / "mf_kernels" / "_cpu.so").is_file()


def test_a_library_switched_off_does_not_survive_from_an_earlier_build(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mf_kernels").mkdir()
    stale = tmp_path / "mf_kernels" / "_cpu.so"
    stale.write_text("of an earlier build")
    setup = (sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path)
    told = must_run(*setup, cwd=source, MF_KERNELS_CPU="0")
    assert "not built: switched off (MF_KERNELS_CPU=0)" in told
    assert not stale.exists()


def pinned(package: str) -> str:
    lines = Path(CONSTRAINTS).read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
