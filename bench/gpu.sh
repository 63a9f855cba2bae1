#!/usr/bin/env bash
# bench/gpu.sh RESULTS: tests the Triton kernels on this machine's GPU, times them beside torch's and writes everything into RESULTS.
# Needs torch 2.11, triton 3.6 and pytest, no network and no build: the Triton backend works without the compiled module.
set -uo pipefail
results=$(realpath -m "${1:?usage: bench/gpu.sh RESULTS}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
export PYTHONPATH=$PWD/python:$PWD/tests FOVEATE_TEST_DEVICE=cuda
python=${PYTHON:-python3}

nvidia-smi >"$results/machine.txt" 2>&1
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' >>"$results/machine.txt" || exit 1
git rev-parse HEAD >>"$results/machine.txt" 2>/dev/null

status=0
timeout 180 "$python" -m pytest -q -x --maxfail=20 -k "triton and not test_random and not bad_input" tests/test_attention_forward.py tests/test_attention_varlen.py \
  tests/test_attention_backward.py tests/test_triton_rows.py tests/test_triton_decode.py >"$results/tests.txt" 2>&1 || status=1
timeout 300 "$python" bench/gpu_triton.py "$results/triton.csv" >"$results/bench.txt" 2>&1 || status=1
tail -n 3 "$results/tests.txt"
tail -n 60 "$results/bench.txt"
exit $status
