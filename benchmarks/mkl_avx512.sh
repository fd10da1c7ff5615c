#!/bin/sh
# Benchmarks with MKL on its AVX-512 path: benchmarks/mkl_avx512.sh [pytest arguments, such as -k images-T1].
#
# MKL asks whether the processor is Intel's and takes slower paths where it is not, which flatters
# whoever does not use MKL. A preloaded library answers yes; rows get mkl=avx512.
set -eu

cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > "$folder/intel.c"
"${CC:-cc}" -shared -fPIC -O2 -o "$folder/intel.so" "$folder/intel.c"
FASTMETA_BENCH_MKL=avx512 LD_PRELOAD="$folder/intel.so" \
    "${PYTHON:-.venv/bin/python}" -m pytest benchmarks -p no:xdist --timeout 1800 "$@"
