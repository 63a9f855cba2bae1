#!/usr/bin/env bash
# bench/gpu.sh RESULTS: builds the package for this machine's GPU, tests the CUDA and the Triton kernels on it, times them beside torch's and
# other libraries' and writes everything into RESULTS, in less than 9 minutes on 16 cores. Needs CUDA 13, torch 2.11, triton 3.6, cmake, ninja,
# pybind11 and pytest (pytest-xdist makes the tests faster), no network. FOVEATE_PEERS: a folder of other libraries, see gpu.py.
set -uo pipefail
results=$(realpath -m "${1:?usage: bench/gpu.sh RESULTS}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
python=${PYTHON:-python3}
status=0

nvidia-smi >"$results/machine.txt" 2>&1
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' >>"$results/machine.txt" || exit 1
git rev-parse HEAD >>"$results/machine.txt" 2>/dev/null

# ---- build: one GPU architecture and one instruction set, those of this machine ----

site=$PWD/build/gpu/site
arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + ("a" if major >= 9 else ""))')
build() {
  cmake -S . -B build/gpu -G Ninja -DFOVEATE_CUDA=ON "-DFOVEATE_CUDA_ARCHS=$arch-real" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" && cmake --build build/gpu || return 1
  rm -rf "$site" && mkdir -p "$site" && cp -r python/foveate "$site/" && cmake --install build/gpu --prefix "$site"
}
timeout 200 bash -c "$(declare -f build); python=$python arch=$arch site=$site; build" >"$results/build.txt" 2>&1 || { status=1; echo "build: failed, or over time"; tail -n 20 "$results/build.txt"; }
[ -d "$site" ] || site=$PWD/python  # Triton works without the compiled module
export PYTHONPATH=$site:$PWD/tests FOVEATE_TEST_DEVICE=cuda

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
tests() {  # tests SECONDS NAME ARGUMENTS...: pytest, its last lines, and whether it passed
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" "$python" -m pytest -q --maxfail=40 "$@" >"$results/tests_$name.txt" 2>&1 || { status=1; echo "tests_$name: failed, or over time"; }
  tail -n 3 "$results/tests_$name.txt"
}

# ---- CUDA ----

tests 40 device "${workers[@]}" tests/test_device_layer.py tests/test_cuda_gpu.py
tests 90 native "${workers[@]}" -k native tests/test_attention_{forward,varlen,backward}.py tests/test_{decode,kv_cache,softmax,cross_entropy,rms_norm,rotary}.py

# ---- Triton: most of the time goes into compiling, a kernel for each set of options ----

tests 80 triton "${workers[@]}" tests/test_triton_{rows,decode,safety,linear_cross_entropy,packed_linear,score_mod,hopper,tune,determinism}.py
tests 80 triton_attention "${workers[@]}" -k "triton and in_bf16 and not test_random" tests/test_attention_{forward,varlen,backward}.py

# Every allocation by itself, so that memcheck sees a read beyond a tensor that torch's allocator would hide.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 25 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -x \
      tests/test_cuda_gpu.py -k sanitized >"$results/sanitizer_$tool.txt" 2>&1 || { status=1; echo "compute-sanitizer $tool: errors, or over time"; }
    tail -n 3 "$results/sanitizer_$tool.txt"
  done
else
  echo "compute-sanitizer: not found, left out"
fi

timeout 170 "$python" bench/gpu.py "$results/gpu.csv" --seconds 140 >"$results/bench.txt" 2>&1 || { status=1; echo "gpu.py: failed, or over time"; }
cat "$results/bench.txt"
exit $status
