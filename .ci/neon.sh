#!/usr/bin/env bash
# The CPU kernels for AArch64 (NEON): cross-compiled and run under emulation against a plain loop.
# Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user); installs them where it may.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "needs g++-aarch64-linux-gnu and qemu-user: install them"; exit 1; }
  apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user >/dev/null
fi
build=build/neon
rm -rf $build && mkdir -p $build
flags=(-std=c++20 -O2 -fopenmp -Icsrc -Icsrc/cuda/device/nvidia -DFOVEATE_ISA=neon "-DFOVEATE_CPU_TARGET_LIST=X(neon)" -fno-math-errno -fno-trapping-math -Wall -Wno-psabi -Wno-maybe-uninitialized)
printf '%s\n' csrc/cpu/*/*.cpp csrc/cuda/host/table.cpp csrc/{ops,decoder,bench}/*.cpp tests/native/attention_check.cpp |
  xargs -P 2 -I{} sh -c 'aarch64-linux-gnu-g++ "$@" -c {} -o '$build'/$(echo {} | tr / _).o' sh "${flags[@]}"
aarch64-linux-gnu-g++ -fopenmp -static $build/*.o -o $build/attention_check
qemu-aarch64 $build/attention_check
aarch64-linux-gnu-g++ "${flags[@]}" -static tests/native/linear_check.cpp $build/csrc_cpu_linear_linear.cpp.o -o $build/linear_check
qemu-aarch64 $build/linear_check
