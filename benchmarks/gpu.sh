#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes:
#
#     benchmarks/gpu.sh [--dry] [worker]        worker: triton (default) or cuda
#
# Builds from the checkout without network, compiles all kernels in parallel, runs the GPU tests,
# compute-sanitizer and the benchmark, and prints a summary last. Every stage has its own time limit
# and writes to $OUT (default runs/gpu) as it goes, so that a cut keeps what was done:
#
#     0_env.log 1_warm.log 2_tests.log 3_sanitizer.log 4_bench.log errors.csv results.csv table.md
#
# The exit status is 0 if no stage failed; a tool that is absent or refuses is a printed skip.
# --dry runs the same stages' logic on a machine without a GPU, tiny.
#
#     LIMIT=470    seconds for everything      PYTHON=python3    the interpreter that has torch
#     JOBS         compilations at a time      FASTMETA_COMMIT   where .git did not travel
set -u

cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
DRY=0
IMPL=triton
for argument in "$@"; do
    case $argument in
        --dry) DRY=1 ;;
        triton | cuda) IMPL=$argument ;;
        *) echo "gpu.sh: $argument; accepted are --dry, triton, cuda" >&2; exit 2 ;;
    esac
done
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
LIMIT=${LIMIT:-470}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}/fastmeta-gpu}
mkdir -p "$SCRATCH"

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="$SCRATCH/triton" TORCHINDUCTOR_CACHE_DIR="$SCRATCH/inductor"
export JAX_COMPILATION_CACHE_DIR="$SCRATCH/jax" XLA_PYTHON_CLIENT_PREALLOCATE=false
rm -f "$OUT"/[0-4]_*.log "$OUT"/errors.csv "$OUT"/results.csv "$OUT"/table.md

STATES=()
FAILED=()
started=$SECONDS

left() { echo $((LIMIT - (SECONDS - started))); }

# limited SECONDS COMMAND...: under a time limit, and never beyond the whole one
limited() {
    local most=$1
    shift
    if [ "$most" -gt "$(left)" ]; then most=$(left); fi
    if [ "$most" -lt 5 ]; then echo "no time left"; return 124; fi
    timeout --kill-after=10 "$most" "$@"
}

# stage NAME SECONDS FUNCTION: its output to a log and here; how it ended to the summary
stage() {
    local name=$1 most=$2 begun=$SECONDS state code
    shift 2
    echo "== $name, $most s at most, $(left) s left"
    "$@" "$most" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) state=ok ;;
        77) state=skipped ;;
        124 | 137) state="cut after $((SECONDS - begun)) s" ;;
        *) state="failed ($code)" ;;
    esac
    case $code in 0 | 77) ;; *) FAILED+=("$name") ;; esac
    STATES+=("$(printf '%-14s %-16s %4s s' "$name" "$state" $((SECONDS - begun)))")
}

environment() {
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    nvcc --version 2>/dev/null | tail -2
    uname -a
    # in place, into the checkout: without the package's CPU worker the rest still runs
    if [ $DRY = 0 ]; then
        MAX_JOBS=$JOBS limited "$1" "$PYTHON" setup.py -q build_ext --inplace ||
            echo "the CPU worker was not built"
    fi
    limited 30 "$PYTHON" - <<'EOF'
import importlib.metadata, platform
import torch
import fastmeta as fm
print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "jax", "pytest", "hypothesis", "pybind11", "ninja", "safetensors"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "absent")
for name, reason in fm.available().items():
    print(name, "runs" if reason is None else reason)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "multiprocessors", p.total_memory >> 20, "MiB")
EOF
}

warm() {
    if [ "$IMPL" = cuda ]; then
        if [ $DRY = 1 ]; then echo "cuda is built for a device, and there is none"; return 77; fi
        MAX_JOBS=$JOBS limited "$1" "$PYTHON" -c "from fastmeta import native; native.cuda.library"
        return
    fi
    if [ $DRY = 1 ]; then
        if ! "$PYTHON" -c "import triton" 2>/dev/null; then echo "no triton"; return 77; fi
        limited "$1" "$PYTHON" benchmarks/warm.py --list
        return
    fi
    # its own clock stops a little earlier, between two kernels
    limited "$1" "$PYTHON" benchmarks/warm.py --jobs "$JOBS" --seconds $(($1 - 15))
}

tests() {
    local parallel=()
    if [ $DRY = 1 ]; then
        limited "$1" "$PYTHON" -m pytest tests/test_gpu.py --collect-only -q -p no:cacheprovider |
            tail -2
        return "${PIPESTATUS[0]}"
    fi
    if "$PYTHON" -c "import xdist" 2>/dev/null; then
        parallel=(-n "$((JOBS > 8 ? 8 : JOBS))")
    fi
    FASTMETA_TEST_IMPLS=$IMPL FASTMETA_TEST_GPU_LOG="$OUT/errors.csv" OMP_NUM_THREADS=1 limited "$1" \
        "$PYTHON" -m pytest tests/test_gpu.py -q -rf --tb=short -p no:cacheprovider \
        -o filterwarnings=default -W ignore "${parallel[@]}"
}

# a tool on a small case: 0 clean, 77 absent or refusing, else what it found
sanitize() {
    local tool=$1 most=$2 code
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$most" compute-sanitizer --tool "$tool" \
        --error-exitcode 86 --print-limit 20 "$PYTHON" benchmarks/smoke.py "$IMPL" >"$SCRATCH/$tool" 2>&1
    code=$?
    tail -40 "$SCRATCH/$tool"
    if grep -qi "device not supported\|error 999\|^=========.*\(unable\|internal error\)" \
        "$SCRATCH/$tool"; then
        echo "$tool: skipped, it refuses this machine"
        return 77
    fi
    return $code
}

sanitizer() {
    local code worst=77 tool
    if [ $DRY = 1 ] || ! command -v compute-sanitizer >/dev/null; then
        echo "skipped: compute-sanitizer is not asked for, or not here"
        return 77
    fi
    limited "$1" "$PYTHON" benchmarks/smoke.py "$IMPL" || return
    for tool in memcheck racecheck; do
        sanitize $tool $(($1 / 2))
        code=$?
        echo "$tool: $code"
        if [ $code != 77 ] && { [ $worst = 77 ] || [ $code != 0 ]; }; then worst=$code; fi
    done
    return $worst
}

bench() {
    local dry=()
    if [ $DRY = 1 ]; then dry=(--dry); fi
    # its own clock stops earlier: the row in progress is finished
    local seconds=$(($(left) - 20))
    if [ "$seconds" -gt $(($1 - 20)) ]; then seconds=$(($1 - 20)); fi
    limited "$1" "$PYTHON" benchmarks/gpu.py --out "$OUT" --impl "$IMPL" --seconds "$seconds" "${dry[@]}"
}

stage 0_env 45 environment
stage 1_warm 110 warm
stage 2_tests 120 tests
stage 3_sanitizer 60 sanitizer
stage 4_bench 260 bench

echo
if [ -f "$OUT/table.md" ]; then cat "$OUT/table.md"; else echo "no table: no row was measured"; fi
echo
printf '%s\n' "${STATES[@]}"
echo "$((SECONDS - started)) s in all; logs and rows in $OUT"
if [ ${#FAILED[@]} -gt 0 ]; then
    echo "failed: ${FAILED[*]}"
    exit 1
fi
