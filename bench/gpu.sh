#!/usr/bin/env bash
# bench/gpu.sh RESULTS: tests the Triton kernels on this machine's GPU, times them beside torch's and other libraries' and writes everything
# into RESULTS, in less than 9 minutes. Needs torch 2.11, triton 3.6 and pytest (pytest-xdist makes the tests faster), no network and no build:
# the Triton backend works without the compiled module. FOVEATE_PEERS: a folder of other libraries, see gpu_triton.py.
set -uo pipefail
results=$(realpath -m "${1:?usage: bench/gpu.sh RESULTS}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
export PYTHONPATH=$PWD/python:$PWD/tests FOVEATE_TEST_DEVICE=cuda
python=${PYTHON:-python3}
status=0

nvidia-smi >"$results/machine.txt" 2>&1
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' >>"$results/machine.txt" || exit 1
git rev-parse HEAD >>"$results/machine.txt" 2>/dev/null

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
tests() {  # tests SECONDS NAME ARGUMENTS...: pytest, its last lines, and whether it passed
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" "$python" -m pytest -q --maxfail=20 "$@" >"$results/tests_$name.txt" 2>&1 || { status=1; echo "tests_$name: failed, or over time"; }
  tail -n 3 "$results/tests_$name.txt"
}

# ---- Triton ----

# Most of the time goes into compiling: a kernel for each set of options.
tests 100 triton "${workers[@]}" tests/test_triton_{rows,decode,safety,linear_cross_entropy,packed_linear,score_mod,hopper,tune,determinism}.py
tests 110 attention "${workers[@]}" -k "triton and in_bf16 and not test_random" tests/test_attention_{forward,varlen,backward}.py

# Every allocation by itself, so that memcheck sees a read beyond a tensor that torch's allocator would hide.
if command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x \
    tests/test_triton_safety.py -k "kv_lens or pages" >"$results/sanitizer.txt" 2>&1 || { status=1; echo "compute-sanitizer: errors, or over time"; }
  tail -n 3 "$results/sanitizer.txt"
else
  echo "compute-sanitizer: not found, left out"
fi

timeout 250 "$python" bench/gpu_triton.py "$results/triton.csv" --seconds 210 >"$results/bench.txt" 2>&1 || { status=1; echo "gpu_triton.py: failed, or over time"; }
cat "$results/bench.txt"
exit $status
