#!/usr/bin/env bash
# The CUDA kernels on the CPU: builds the package against the emulator into build/emulator and runs pytest on it with the arguments given.
# native is then the CUDA kernels, on CPU tensors. FOVEATE_EMULATOR_SCHEDULE, _SEED and _RACE: docs/kernels/emulator.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python} build=build/emulator
site=$PWD/$build/site
export OMP_WAIT_POLICY=passive  # kernels run on one thread; torch's others would spin against it and against other test processes

cmake -S . -B $build -G Ninja -DFOVEATE_EMULATOR=ON -DFOVEATE_CUDA=OFF -DFOVEATE_CPU_TARGETS=baseline -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" ${CMAKE_CXX_COMPILER_LAUNCHER:+-DCMAKE_CXX_COMPILER_LAUNCHER=$CMAKE_CXX_COMPILER_LAUNCHER} >/dev/null
cmake --build $build
rm -rf "$site" && mkdir -p "$site/foveate"
for file in python/foveate/*; do
  case $file in *.so | *__pycache__) ;; *) ln -s "$PWD/$file" "$site/foveate/" ;; esac
done
cmake --install $build --prefix "$site" >/dev/null
PYTHONPATH=$site:$PWD/tests/support exec "$python" -m pytest "$@"
