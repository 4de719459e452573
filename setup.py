"""Builds the compiled libraries; everything else about the package is in pyproject.toml.

    MF_KERNELS_CPU=auto|1|0     C++ for the CPU, kernels and inference engine.
                                auto: if there is a compiler.  1: or fail.  0: leave it out.
    MF_KERNELS_CUDA=auto|1|0    CUDA C++.         auto: if nvcc has torch's CUDA major version.
                                1: whatever torch was built for, or fail.  0: leave it out.

Without any library the package is pure Python and computes the same numbers through plain PyTorch. What was
built, with what, and why the rest was not is printed and written to mf_kernels/_build.json.

Two of the libraries speak to torch through its stable C interface alone: no symbol of CPython's or of
libtorch's C++ is in them, so one file serves every Python and every torch from 2.10 on. The third, the
inference engine, knows no torch but is a module of one CPython, which the tag of a wheel with it names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, SetupError

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)

# For every machine of the platform, so no -march=native: the instruction set is chosen at run time. And no
# -ffast-math: the three -f flags allow vector code without changing what a sum or a product is. Nobody reads
# errno or a trap here, and a multiply-add rounded once is closer to the truth than one rounded twice.
COMMON_FLAGS = ["-O3", "-std=c++20"]
CXX_FLAGS = [*COMMON_FLAGS, "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
STABLE_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = [*COMMON_FLAGS, *STABLE_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]  # a third of the size on disk
# Machine code for the two data centre generations, and PTX from which the driver makes any later one.
NVCC_ARCHITECTURES = [f"-gencode=arch=compute_{code[-2:]},code={code}" for code in ("sm_80", "sm_90", "compute_90")]


@dataclass(frozen=True)
class Library:
    """One compiled file of the package."""

    name: str  # dotted, as if it were a module
    sources: str  # glob, each file one translation unit
    switch: str  # environment variable
    device: str  # "cpu" or "cuda"
    python_module: bool = False  # True: pybind11, bound to one CPython. False: torch's stable interface


LIBRARIES = (
    Library("mf_kernels._cpu", "csrc/cpu/*.cpp", "MF_KERNELS_CPU", "cpu"),
    Library("mf_kernels._cuda", "csrc/cuda/*.cu", "MF_KERNELS_CUDA", "cuda"),
    Library("mobileformer._engine", "csrc/engine/*.cpp", "MF_KERNELS_CPU", "cpu", python_module=True),
)


@dataclass
class Outcome:
    """What became of one library: the rows of the summary and of _build.json."""

    built: bool = False
    reason: str | None = None  # why not, if not built
    compiler: str | None = None
    flags: list[str] = field(default_factory=list)


class NotHere(Exception):
    """A library cannot be built on this machine; the message says why."""


def read_switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SetupError(f"{name}: expected auto, 1 or 0, got {value!r}")
    return value


def first_line(*command: str) -> str | None:
    """First line that a program prints, or None if there is no such program or it fails."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.strip().partition("\n")[0]


def one_word(command: str) -> str:
    """A program that runs a compiler of several words, "ccache g++" say, which torch would take for the name of one."""
    program = ROOT / "build" / "cxx" / "c++"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.join(shlex.split(command))} "$@"\n')
    program.chmod(0o755)
    return str(program)


def find_cxx() -> str:
    """First line of the C++ compiler's --version; leaves its name in CXX, for setuptools and torch."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        version = first_line(*shlex.split(candidate), "--version")
        if version is not None:
            os.environ["CXX"] = candidate if len(shlex.split(candidate)) == 1 else one_word(candidate)
            return version
    tried = f"CXX={wanted} does not run" if wanted else "tried c++, g++, clang++"
    raise NotHere(f"no C++ compiler ({tried})")


def find_nvcc() -> tuple[str, int]:
    """nvcc's version and its major number; leaves the toolkit's folder in CUDA_HOME, where torch looks."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        raise NotHere(f"no nvcc in {home}/bin" if home else "no nvcc on the PATH")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise NotHere(f"{nvcc} --version names no release")
    if not home:
        # nvcc may be a link or a script that calls the real one, so its own folder is no guide: ask it.
        dry = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        home = os.path.realpath(top.group(1)) if top else str(Path(nvcc).resolve().parent.parent)
        os.environ["CUDA_HOME"] = home
    return f"nvcc {release.group(1)}.{release.group(2)}", int(release.group(1))


def import_torch():
    """torch, for its headers and its BuildExtension; never asks whether a GPU is there."""
    try:
        import torch
    except ImportError as error:
        raise NotHere(f"torch cannot be imported in the build environment ({error})") from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        raise NotHere(f"torch {torch.__version__} is older than {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}")
    return torch


def make_extension(library: Library, switch: str) -> tuple[Extension, str]:
    """The extension and a line naming its compiler. Raises NotHere with the reason."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(library.sources))
    if not sources:
        raise NotHere(f"no sources ({library.sources})")
    if switch == "0":
        raise NotHere(f"switched off ({library.switch}=0)")
    compiler = find_cxx()
    nvcc_major = 0
    if library.device == "cuda":
        nvcc, nvcc_major = find_nvcc()
        compiler = f"{nvcc}, {compiler}"
    torch = import_torch()
    if library.device == "cuda" and switch == "auto":
        if torch.version.cuda is None:
            raise NotHere(f"torch {torch.__version__} is for the CPU ({library.switch}=1 builds all the same)")
        if int(torch.version.cuda.partition(".")[0]) != nvcc_major:
            raise NotHere(f"{nvcc} beside torch for CUDA {torch.version.cuda}: the major versions differ")

    includes, libraries, library_dirs = [], [], []
    flags = {"cxx": list(CXX_FLAGS), "nvcc": list(NVCC_FLAGS)}
    if library.python_module:
        import pybind11

        includes.append(pybind11.get_include())
    else:
        from torch.utils import cpp_extension

        if library.device == "cuda":
            cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # looked up once, before we knew
        flags["cxx"] += STABLE_FLAGS
        includes += cpp_extension.include_paths(library.device)
        library_dirs += cpp_extension.library_paths(library.device)
        # Linked to be found at load time only: torch is in the process before the library is, so no run path.
        libraries += ["torch", "torch_cpu"]
        if library.device == "cuda":
            libraries += ["cudart", *(["torch_cuda"] if torch.version.cuda else [])]
            if "TORCH_CUDA_ARCH_LIST" not in os.environ:
                flags["nvcc"] += NVCC_ARCHITECTURES
    flags["cxx"] += shlex.split(os.environ.get("CXXFLAGS", ""))  # after ours: whoever builds has the last word
    # System includes: somebody else's headers are not ours to warn about.
    system = [argument for path in includes for argument in ("-isystem", path)]
    extension = Extension(
        library.name,
        sources,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={language: [*arguments, *system] for language, arguments in flags.items()},
        depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.*h")),
        language="c++",
    )
    extension.recorded_flags = flags["nvcc" if library.device == "cuda" else "cxx"]
    return extension, compiler


class BuildLibraries(build_ext):
    """Builds each library on its own, so that one that fails takes no other with it."""

    outcomes: dict[str, Outcome] | None = None  # None until run

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:
            # An editable install gets a new temporary folder each time; kept objects make the next one quick.
            self.build_temp = str(ROOT / "build" / f"inplace-{sys.implementation.cache_tag}")

    def run(self) -> None:
        self.outcomes = {library.name: self.build_library(library) for library in LIBRARIES}
        report = Path("mf_kernels", "_build.json")
        Path(self.build_lib, report).parent.mkdir(parents=True, exist_ok=True)
        Path(self.build_lib, report).write_text(json.dumps(self.report(), indent=2) + "\n")
        if self.inplace:
            self.place(Path(self.build_lib, report), ROOT / report)
        print("\n".join(self.summary()), flush=True)

    def build_library(self, library: Library) -> Outcome:
        outcome = self.try_to_build(library, read_switch(library.switch))
        if not outcome.built:
            # A library of an earlier build must not outlive the decision to leave it out.
            for stale in self.candidates(library):
                stale.unlink(missing_ok=True)
        return outcome

    def try_to_build(self, library: Library, switch: str) -> Outcome:
        try:
            extension, compiler = make_extension(library, switch)
        except NotHere as reason:
            if switch == "1" and not str(reason).startswith("no sources"):
                raise SetupError(f"{library.switch}=1: {library.name} cannot be built: {reason}") from None
            return Outcome(reason=str(reason))
        outcome = Outcome(compiler=compiler, flags=extension.recorded_flags)
        try:
            built = self.compile(library, extension)
        except (BaseError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if switch == "1":
                raise CompileError(f"{library.switch}=1: {library.name} does not compile: {error}") from error
            outcome.reason = f"does not compile with {compiler}: {error}"
            warn(
                f"WARNING: {library.name} {outcome.reason}",
                f"The package goes on without it, slower. {library.switch}=1 makes this an error.",
            )
            return outcome
        if self.inplace:
            self.place(built, ROOT / built.relative_to(self.build_lib))
        outcome.built = True
        return outcome

    def compile(self, library: Library, extension: Extension) -> Path:
        from torch.utils.cpp_extension import BuildExtension

        scripts = sysconfig.get_path("scripts")
        if not shutil.which("ninja") and shutil.which("ninja", path=scripts):
            os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
        self.distribution.ext_modules = [extension]
        build = BuildExtension.with_options(no_python_abi_suffix=not library.python_module)
        command = build(self.distribution)
        command.build_lib = self.build_lib
        command.build_temp = str(Path(self.build_temp, library.name))  # one build.ninja for each library
        command.debug = self.debug
        command.ensure_finalized()
        if library.device == "cuda":
            drop_outdated_objects(Path(command.build_temp), extension.depends)
        command.run()
        return Path(self.build_lib, command.get_ext_filename(library.name))

    def candidates(self, library: Library) -> list[Path]:
        """Where a library of this name may lie from an earlier build, whatever its suffix."""
        stem = Path(*library.name.split("."))
        roots = [Path(self.build_lib), *([ROOT] if self.inplace else [])]
        return [path for root in roots for path in (root / stem.parent).glob(f"{stem.name}.*so")]

    def built(self) -> list[Library]:
        return [library for library in LIBRARIES if (self.outcomes or {}).get(library.name, Outcome()).built]

    def report(self) -> dict:
        try:
            torch = import_torch()
            versions = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        except NotHere:
            versions = {"torch": None, "torch_cuda": None}
        commit = first_line("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
        return {
            "version": self.distribution.get_version(),
            "commit": commit,
            "python": sys.version.partition(" ")[0],
            **versions,
            "libraries": {name: asdict(outcome) for name, outcome in (self.outcomes or {}).items()},
        }

    def summary(self) -> list[str]:
        outcomes = self.outcomes or {}
        width = max(len(name) for name in outcomes)
        lines = [f"mobileformer {self.distribution.get_version()}: compiled libraries"]
        for name, outcome in outcomes.items():
            text = f"built with {outcome.compiler}" if outcome.built else f"not built: {outcome.reason}"
            lines.append(f"  {name:<{width}}  {text}")
        if not self.built():
            lines.append("  No library: the package is pure Python and runs on plain PyTorch.")
        return lines

    @staticmethod
    def place(source: Path, target: Path) -> None:
        """Copy beside the target, then rename: a process that has the old file open keeps it whole."""
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists csrc, headers and all, whatever this machine can build

    def get_outputs(self) -> list[str]:
        found = [str(path) for library in self.built() for path in self.candidates(library)]
        return [*found, str(Path(self.build_lib, "mf_kernels", "_build.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        inside = [Path(path) for path in self.get_outputs() if Path(path).is_relative_to(self.build_lib)]
        return {str(path): str(ROOT / path.relative_to(self.build_lib)) for path in inside}


def drop_outdated_objects(folder: Path, headers: list[str]) -> None:
    """Beside a CPU-only torch, BuildExtension keeps no dependencies for nvcc: any newer header counts."""
    newest = max((Path(ROOT, header).stat().st_mtime for header in headers), default=0.0)
    for item in folder.rglob("*.o"):
        if item.stat().st_mtime < newest:
            item.unlink()


def warn(*lines: str) -> None:
    """Among the hundreds of lines of a build log."""
    print("!" * 100, *lines, "!" * 100, sep="\n", file=sys.stderr, flush=True)


class Wheel(bdist_wheel):
    """py3-none-any without libraries, py3-none-<platform> with them, cp3xx with a Python module."""

    def get_tag(self) -> tuple[str, str, str]:
        command = self.get_finalized_command("build_ext")
        if command.outcomes is not None and not command.built():
            self.root_is_pure = True
            return "py3", "none", "any"
        tag = super().get_tag()
        if any(library.python_module for library in command.built()):
            return tag
        return "py3", "none", tag[2]


class PackageWithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # which ones is known only once they are built, and the report is written either way


if __name__ == "__main__":
    setup(distclass=PackageWithLibraries, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel})
