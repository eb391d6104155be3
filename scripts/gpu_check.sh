#!/usr/bin/env bash
# Tests the Triton kernels on this machine's GPU and times decoding and prefill against dense attention; offline, nothing
# installed.
#   scripts/gpu_check.sh [--dry-run] [--only STEP] [OUT]     results go to OUT, by default runs/gpu_check
# Steps: tests, sanitizer (compute-sanitizer, where it is), bench. Needs torch, triton, transformers, pytest and numpy in
# python3, or in PYTHON=/path/to/python. MINUTES (8) limits bench, half of them for each; TEST_SECONDS (900) the tests.
# --dry-run, or a machine without a GPU: says what would run, collects the tests with only these packages importable,
# and runs bench on the CPU at sizes that say nothing about speed.
# Exit status: 0, 1 where a step fails, 2 for arguments or an environment that do not fit.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
MINUTES="${MINUTES:-8}"
TEST_SECONDS="${TEST_SECONDS:-900}"
STEPS=(tests sanitizer bench)
DRY=
ONLY=
OUT=

fail() {
    printf 'gpu_check.sh: %s\n' "$*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) DRY=1 ;;
        --only)
            [ $# -ge 2 ] || fail "--only needs one of: ${STEPS[*]}"
            ONLY="$2"
            shift
            ;;
        -h | --help)
            sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) fail "unknown option $1; allowed are --dry-run, --only STEP and --help" ;;
        *)
            [ -z "$OUT" ] || fail "one OUT is enough, got $OUT and $1"
            OUT="$1"
            ;;
    esac
    shift
done
if [ -n "$ONLY" ]; then
    [[ " ${STEPS[*]} " == *" $ONLY "* ]] || fail "--only must be one of: ${STEPS[*]}; got $ONLY"
    STEPS=("$ONLY")
fi
[[ "$MINUTES" =~ ^[1-9][0-9]*$ ]] || fail "MINUTES must be a whole number of minutes, got $MINUTES"
[[ "$TEST_SECONDS" =~ ^[1-9][0-9]*$ ]] || fail "TEST_SECONDS must be a whole number of seconds, got $TEST_SECONDS"
OUT="${OUT:-$ROOT/runs/gpu_check}"
mkdir -p "$OUT" || fail "OUT=$OUT cannot be written"
OUT="$(cd "$OUT" && pwd)"
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run"
if [[ "$PYTHON" == */* ]]; then # relative to where the check is called
    PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
fi
cd "$ROOT" || exit 2

# Only what is asked for is loaded into pytest, whatever else is installed.
export PYTHONPATH="$ROOT" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
SUMMARY="$OUT/summary.txt"
STATUS=0
: >"$SUMMARY"

# record STEP RESULT SECONDS WHAT: one line of the summary; the result FAILED makes the whole check fail.
record() {
    printf '%-13s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4" >>"$SUMMARY"
    [ "$2" != FAILED ] || STATUS=1
}

# logged NAME COMMAND...: shows the command, runs it, keeps its output in OUT/NAME.log.
logged() {
    local name="$1"
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$OUT/$name.log"
    return "${PIPESTATUS[0]}"
}

check_environment() {
    "$PYTHON" - <<'PY' | tee "$OUT/environment.txt"
import importlib, sys
print("python", sys.version.split()[0], sys.executable)
missing = []
for name in ("torch", "triton", "transformers", "pytest", "numpy"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError as error:
        missing.append(f"{name} ({error})")
if missing:
    sys.exit(f"not there: {', '.join(missing)}")
import torch
print("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
PY
    [ "${PIPESTATUS[0]}" -eq 0 ] || fail "$PYTHON lacks what is needed; choose another with PYTHON=/path/to/python"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi >>"$OUT/environment.txt" 2>&1
    fi
}

# Modules of other packages look as if they were not installed, so that what needs them shows.
hide_other_packages() {
    mkdir -p "$OUT/hidden"
    cat >"$OUT/hidden/sitecustomize.py" <<'PY'
import sys
for name in ("accelerate", "datasets", "eval_tasks", "evaluate", "gguf", "hypothesis", "lm_eval", "matplotlib", "peft", "psutil"):
    sys.modules[name] = None
PY
    export PYTHONPATH="$OUT/hidden:$ROOT"
}

# Counts of a pytest log's last line, such as "12 passed, 3 skipped in 4.56s".
counts_of() {
    grep -E '[0-9]+ (passed|failed|error|skipped|deselected|tests? collected)' "$1" | tail -n 1 | sed 's/=//g; s/^ *//; s/ *$//'
}

run_tests() {
    local begin=$SECONDS code counts
    local pytest=("$PYTHON" -m pytest -m gpu -q -p no:cacheprovider)
    local full=(-rsf --durations=10 tests/test_triton_*.py)
    if [ -n "$DRY" ]; then
        printf '\nwould run: timeout %s %s\n' "$TEST_SECONDS" "${pytest[*]} ${full[*]}"
        logged tests "${pytest[@]}" --collect-only -qq tests/test_triton_*.py
        code=$?
        counts="$(awk -F': ' '/^tests\/.*: [0-9]+$/ { n += $2 } END { print n + 0 }' "$OUT/tests.log")"
        if [ $code -eq 0 ] && [ "$counts" -gt 0 ]; then
            record tests dry $((SECONDS - begin)) "$counts tests for a GPU collected"
        else
            record tests FAILED $((SECONDS - begin)) "collecting ended with $code, $counts tests; see tests.log"
        fi
        return
    fi
    logged tests timeout "$TEST_SECONDS" "${pytest[@]}" "${full[@]}"
    code=$?
    counts="$(counts_of "$OUT/tests.log")"
    if [ $code -eq 124 ]; then
        record tests FAILED $((SECONDS - begin)) "stopped after TEST_SECONDS=$TEST_SECONDS; see tests.log"
    elif [ $code -ne 0 ] || [[ "$counts" != *passed* ]]; then
        record tests FAILED $((SECONDS - begin)) "${counts:-pytest ended with $code}; see tests.log"
    else
        record tests ok $((SECONDS - begin)) "$counts"
    fi
}

run_sanitizer() {
    local begin=$SECONDS code
    local command=(compute-sanitizer --tool memcheck --error-exitcode 99 "$PYTHON" "$OUT/small_decode.py")
    cat >"$OUT/small_decode.py" <<'PY'
"""One decoding step of every selection, small, for a memory checker."""
import torch
from nc_patch import KeyIndex, sparse_attention
torch.manual_seed(0)
query, key, value = (torch.randn(2, heads, n, 64, device="cuda").bfloat16() for heads, n in ((4, 1), (2, 333), (2, 333)))
end = torch.full((2,), 333, dtype=torch.int32, device="cuda")
with torch.inference_mode():
    for selection, kind in (("topk", "codes"), ("block", "pages"), ("window", None), ("topk", None)):
        index = KeyIndex.build(key, kind) if kind else None
        if index is not None:
            index.extend(key, 1, end)
        output = sparse_attention(query, key, value, alpha=2.0, C=0.6, selection=selection, index=index)
        print(selection, kind, "finite:", bool(output.isfinite().all()))
PY
    if [ -n "$DRY" ]; then
        printf '\nwould run: timeout 240 %s\n' "${command[*]}"
        record sanitizer dry 0 "$(command -v compute-sanitizer || echo 'compute-sanitizer is not there')"
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        record sanitizer "not run" 0 "compute-sanitizer is not there"
        return
    fi
    # Every tensor has an allocation of its own, so that reads beyond one show.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 logged sanitizer timeout 240 "${command[@]}"
    code=$?
    case $code in
        0) record sanitizer ok $((SECONDS - begin)) "$(grep 'ERROR SUMMARY' "$OUT/sanitizer.log" | tail -n 1)" ;;
        99) record sanitizer FAILED $((SECONDS - begin)) "$(grep 'ERROR SUMMARY' "$OUT/sanitizer.log" | tail -n 1); see sanitizer.log" ;;
        *) record sanitizer "not run" $((SECONDS - begin)) "ended with $code without a finding; see sanitizer.log" ;;
    esac
}

run_bench() {
    bench decode --batch 1 8 --lengths 4096 16384 32768 65536 131072 262144 --generate
    bench prefill --lengths 8192 32768 131072 524288 1048576 --forward
}

# bench NAME ARGUMENTS...: one benchmark, for half of the time; its line of the summary is bench-NAME.
bench() {
    local begin=$SECONDS name="$1" seconds=$((30 * MINUTES)) code
    shift
    local command=("$PYTHON" -m nc_patch bench "$name" --out "$OUT/bench")
    local full=(--device cuda --minutes "$(awk "BEGIN { print $seconds / 60 }")" "$@")
    local tiny=(--device cpu --geometry smollm2 --lengths 64 200 --repeats 1 --minutes 1)
    local results="$OUT/bench/$name.json"
    if [ -n "$DRY" ]; then
        printf '\nwould run: %s\n' "${command[*]} ${full[*]}"
        full=("${tiny[@]}")
    fi
    # An interrupt leaves the results so far, and the table of them.
    logged "bench-$name" timeout -s INT -k 20 $((seconds + 45)) "${command[@]}" "${full[@]}"
    code=$?
    case $code in
        0) record "bench-$name" "$([ -n "$DRY" ] && echo dry || echo ok)" $((SECONDS - begin)) "$results" ;;
        124) record "bench-$name" stopped $((SECONDS - begin)) "at its time limit; what was measured is in $results" ;;
        *) record "bench-$name" FAILED $((SECONDS - begin)) "ended with $code; see bench-$name.log" ;;
    esac
}

check_environment
if [ -z "$DRY" ] && ! grep -q '^gpu ' "$OUT/environment.txt"; then
    fail "the environment could not be read"
fi
if [ -z "$DRY" ] && grep -q '^gpu none' "$OUT/environment.txt"; then
    echo "There is no GPU here: this is a dry run."
    DRY=1
fi
[ -z "$DRY" ] || hide_other_packages
for step in "${STEPS[@]}"; do
    "run_$step"
done
printf '\n== summary, in %s\n' "$OUT"
cat "$SUMMARY"
exit "$STATUS"
