#!/usr/bin/env bash
# The CUDA kernels as nvcc compiles them for sm_80, executed on the CPU (docs/kernels/ptx_machine.md): compiles them to PTX into build/ptx and
# runs pytest on the emulator's build, whose launches then go to the PTX machine. Arguments are those of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
PYTHONPATH=$PWD/tests/support:$PWD/tools "$python" tests/ptx/ptx_programs.py >/dev/null
FOVEATE_EMULATOR_PTX=$PWD/build/ptx exec bash .ci/emulator.sh "$@"
