#!/usr/bin/env bash
# benchmarks/gpu.sh [--rehearse] [--only STEP,STEP] RESULTS: builds the package for this machine's GPU, tests the CUDA and the Triton kernels on it,
# times them beside torch's and other libraries', and writes everything into RESULTS as it comes, in less than 9 minutes on 16 cores: a step
# gets no more time than is left, and one that gets none is named. Needs CUDA 13, torch 2.11, triton 3.6, cmake, ninja, pybind11 and pytest
# (pytest-xdist makes the tests faster), no network. FOVEATE_PEERS: a folder of other libraries, see gpu.py.
#
# Steps, the most telling first: build device bench native triton sanitizer peers. --only runs some of them; a build stays for later runs.
# --rehearse: the same steps without a GPU, with a build for the CPU, triton's interpreter, some of the tests and tiny sizes.
set -uo pipefail
usage="usage: benchmarks/gpu.sh [--rehearse] [--only STEP,STEP] RESULTS"
rehearse=""
only=build,device,bench,native,triton,sanitizer,peers
while [ $# -gt 1 ]; do
  case $1 in
    --rehearse) rehearse=1 ;;
    --only) only=$2; shift ;;
    *) echo "$usage"; exit 2 ;;
  esac
  shift
done
results=$(realpath -m "${1:?$usage}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
python=$(command -v "${PYTHON:-python3}")
export PATH=$(dirname "$python"):$PATH:/usr/local/cuda/bin
status=0
total=525  # seconds for all steps
slower=1   # than the machine that the limits of the steps are for
[ -n "$rehearse" ] && total=5400 slower=10

say() { echo "$*" | tee -a "$results/summary.txt"; }

{
  date -u
  git rev-parse HEAD 2>/dev/null || echo "${FOVEATE_COMMIT:-no git}"
  nvidia-smi 2>&1
  echo "$(nproc) cores"
  "$python" -c 'import sys, torch, triton, numpy; print(sys.version); print("torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
} >"$results/summary.txt" 2>&1 || { cat "$results/summary.txt"; exit 1; }

step() {  # step NAME SECONDS FILE COMMAND...: the command's output goes to FILE; says how it ended and shows its last lines
  local name=$1 limit=$(($2 * slower)) file=$results/$3 start=$SECONDS code=0
  shift 3
  [[ ,$only, == *,$name,* ]] || return 0
  [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total - SECONDS))
  if [ "$limit" -lt 5 ]; then say "$name: left out, the time is over"; status=1; return 0; fi
  timeout -k 5 "$limit" "$@" >"$file" 2>&1 || code=$?
  case $code in
    0) say "$name: passed in $((SECONDS - start)) s" ;;
    124 | 137) say "$name: stopped after its $limit s"; status=1 ;;
    *) say "$name: failed with $code in $((SECONDS - start)) s"; status=1 ;;
  esac
  tail -n 4 "$file" | cut -c1-200
}

# ---- build: one GPU architecture and one instruction set, those of this machine ----

site=$PWD/build/gpu/site
target=avx2
for flag in avx512f avx512_bf16; do grep -qw $flag /proc/cpuinfo && target=${flag/512f/512}; done
if [ -n "$rehearse" ]; then
  options=(-DFOVEATE_CUDA=OFF)
else
  arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + ("a" if major >= 9 else ""))') || exit 1
  options=(-DFOVEATE_CUDA=ON "-DFOVEATE_CUDA_ARCHS=$arch-real")
fi
build() {
  cmake -S . -B build/gpu -G Ninja "-DFOVEATE_CPU_TARGETS=$target" "-DPython_EXECUTABLE=$python" \
    "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" "$@" && cmake --build build/gpu || return 1
  rm -rf "$site" && cmake --install build/gpu --prefix "$site"
}
export -f build
export python site target
step build 170 build.txt bash -c 'build "$@"' build "${options[@]}"
if [ -d "$site" ]; then  # the Python files are those of now, also beside the kernels of an earlier run
  tar -C python --exclude='*.so' --exclude=__pycache__ -cf - foveate | tar -C "$site" -xf -
else
  site=$PWD/python
  say "without the compiled kernels, for which the step build has not run"
fi

export PYTHONPATH=$site:$PWD/tests/support PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$PWD/build/gpu/triton
workers=(-n 12)
if [ -n "$rehearse" ]; then
  export TRITON_INTERPRET=1 OMP_WAIT_POLICY=passive
  workers=(-n 2)
  dry=(--dry-run)
else
  export FOVEATE_TEST_DEVICE=cuda
  dry=()
fi
"$python" -c 'import xdist' 2>/dev/null || workers=()
# -W default: another version of a library may warn of what the pinned one does not. pytest-benchmark cannot share a run with xdist.
pytest=("$python" -m pytest -q --maxfail=40 -W default -p no:benchmark -p no:cacheprovider "${workers[@]}")

marked() { grep -rlE --include='test_*.py' "pytest\.mark\.($1)\b" tests; }  # pytest reads only the files that have the marker

# ---- what a kernel needs from the device, then the numbers: gpu.py checks each result before it is timed ----

step device 50 tests_device.txt "${pytest[@]}" -m device $(marked device)
step bench 140 bench.txt "$python" benchmarks/gpu.py "$results/gpu.csv" --peers without --seconds 110 "${dry[@]}"

# ---- tests: for Triton most of the time goes into compiling, a kernel for each set of options ----

native_k="" triton_k="not test_random"
if [ -n "$rehearse" ]; then
  native_k="(test_attention_backward and 9x41) or test_rms_norm"
  triton_k="(test_attention_backward and in_bf16 and 9x41) or (test_triton_rows and strided)"
fi
step native 90 tests_native.txt "${pytest[@]}" -m "cuda and native" -k "$native_k" $(marked cuda)
step triton 110 tests_triton.txt "${pytest[@]}" -m "gpu and triton" -k "$triton_k" $(marked gpu)

# ---- compute-sanitizer: some machines refuse it, which is no failure of the kernels ----

sanitize() {  # every allocation by itself, so that memcheck sees a read beyond a tensor that torch's allocator would hide
  local tool
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -x -W default -p no:benchmark $(marked device) -k sanitized || return
  done
}
export -f marked sanitize
if [[ ,$only, != *,sanitizer,* ]]; then
  :
elif [ -n "$rehearse" ] || ! command -v compute-sanitizer >/dev/null; then
  say "sanitizer: left out, there is no compute-sanitizer or no GPU"
elif ! timeout 40 compute-sanitizer "$python" -c 'import torch; torch.ones(1, device="cuda")' >"$results/sanitizer.txt" 2>&1; then
  say "sanitizer: left out, this machine refuses compute-sanitizer: $(grep -m 1 -i 'error\|not supported' "$results/sanitizer.txt")"
else
  step sanitizer 75 sanitizer.txt bash -c sanitize
fi

[ -n "$rehearse" ] && folder=none || folder=${FOVEATE_PEERS:-}
FOVEATE_PEERS=$folder step peers 120 peers.txt "$python" benchmarks/gpu.py "$results/gpu.csv" --peers only --seconds 100 "${dry[@]}"
say "exit $status after $SECONDS s"
exit $status
