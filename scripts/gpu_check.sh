#!/usr/bin/env bash
# Holds the Triton kernels on this machine's GPU to the reference and times them against dense attention; offline,
# nothing installed. Two parts of six minutes at most each; without PART both, one after the other:
#   scripts/gpu_check.sh [--dry-run] prefill [OUT]    every test of the kernels, then prefill of long prompts
#   scripts/gpu_check.sh [--dry-run] decode [OUT]     CUDA graphs, decoding, and a memory checker (compute-sanitizer)
# Results: OUT/gpu_check_PART.txt, a summary, and OUT/gpu_check_PART.tar.gz, the rest; OUT is by default runs/gpu_check.
# Needs torch, triton, transformers, matplotlib, numpy, pandas, psutil, pytest and pytest-xdist in python3, or in
# PYTHON=/path/to/python.
# --dry-run, or a machine without a GPU: collects the tests with only these packages importable, runs the benchmarks on
# the CPU at sizes that say nothing about speed, and compiles all that they and the memory checker launch for an H200.
# Exit status: 0, 1 where a step fails, 2 for arguments or an environment that do not fit.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
DRY=
PART=
OUT=
# FlexAttention, which would be compiled for every length, is left out.
MODEL=(--geometry llama3-8b --dtype bfloat16 --dense sdpa flash_attn)
PREFILL=(prefill "${MODEL[@]}" --selections block --lengths 32768 131072 524288)
DECODE=(decode "${MODEL[@]}" --selections topk block --batch 1 8 --lengths 32768 131072 524288)

fail() {
    printf 'gpu_check.sh: %s\n' "$*" >&2
    exit 2
}

for argument in "$@"; do
    case "$argument" in
        --dry-run) DRY=--dry-run ;;
        -h | --help)
            sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) fail "unknown option $argument; allowed are --dry-run and --help" ;;
        *)
            if [ -z "$PART$OUT" ] && [[ "$argument" =~ ^(prefill|decode)$ ]]; then
                PART="$argument"
            else
                [ -z "$OUT" ] || fail "one OUT is enough, got $OUT and $argument; a part is prefill or decode"
                OUT="$argument"
            fi
            ;;
    esac
done
OUT="${OUT:-$ROOT/runs/gpu_check}"
if [ -z "$PART" ]; then
    STATUS=0
    for part in prefill decode; do
        "${BASH_SOURCE[0]}" $DRY "$part" "$OUT" || STATUS=$?
        [ $STATUS -ne 2 ] || break
    done
    exit $STATUS
fi
mkdir -p "$OUT" || fail "OUT=$OUT cannot be written"
RESULTS="$(cd "$OUT" && pwd)/gpu_check_$PART"
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run"
if [[ "$PYTHON" == */* ]]; then # relative to where the check is called
    PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
fi
cd "$ROOT" || exit 2
{ rm -rf "$RESULTS" && mkdir "$RESULTS"; } || fail "$RESULTS cannot be written"

# Only what is asked for is loaded into pytest, whatever else is installed.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
STATUS=0
: >"$RESULTS.txt"

# record STEP RESULT WHAT: one line of the summary; the result FAILED makes the whole check fail.
record() {
    printf '%-9s %-8s %4s s  %s\n' "$1" "$2" "$TOOK" "$3" >>"$RESULTS.txt"
    [ "$2" != FAILED ] || STATUS=1
}

# timed STEP UNTIL COMMAND...: runs the command, its output in STEP.log too, and interrupts it when the check has run for
# UNTIL seconds, or a dry run for an hour; sets TOOK and CODE, 124 where it was interrupted.
timed() {
    local step="$1" begin=$SECONDS limit=$(($2 - SECONDS))
    shift 2
    [ -z "$DRY" ] || limit=3600
    printf '\n== %s, %s s at most: %s\n' "$step" "$limit" "$*"
    timeout -s INT -k 15 $((limit > 1 ? limit : 1)) "$@" 2>&1 | tee -a "$RESULTS/$step.log"
    CODE=${PIPESTATUS[0]} TOOK=$((SECONDS - begin))
    [ "$CODE" -ne 137 ] || CODE=124 # it did not end when it was interrupted, and was killed
}

check_environment() {
    "$PYTHON" - <<'PY' | tee "$RESULTS/machine.txt"
import sys
import matplotlib, numpy, pandas, psutil, pytest, torch, transformers, triton, xdist
print("python", sys.version.split()[0], sys.executable)
for package in (torch, triton, transformers, matplotlib, numpy, pandas, psutil, pytest, xdist):
    print(package.__name__, package.__version__)
print("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
PY
    [ "${PIPESTATUS[0]}" -eq 0 ] || fail "$PYTHON lacks what is needed; choose another with PYTHON=/path/to/python"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi >>"$RESULTS/machine.txt" 2>&1
    fi
}

# Modules of other packages look as if they were not installed, so that what needs them shows.
hide_other_packages() {
    mkdir "$RESULTS/hidden"
    cat >"$RESULTS/hidden/sitecustomize.py" <<'PY'
import sys
for name in ("accelerate", "datasets", "evaluate", "gguf", "hypothesis", "lm_eval", "peft"):
    sys.modules[name] = None
PY
    export PYTHONPATH="$RESULTS/hidden:$PYTHONPATH"
}

# run_tests STEP UNTIL FILES...: over all cores but two, in processes of which one that breaks its GPU is replaced.
run_tests() {
    local step="$1" until="$2" workers=$(($(nproc) - 2)) counts
    shift 2
    workers=$((workers < 1 ? 1 : workers > 16 ? 16 : workers))
    # Where a test hangs is printed after 90 s.
    local how=(-n "$workers" --dist worksteal -rsfE --durations=10 -o faulthandler_timeout=90)
    [ -z "$DRY" ] || how=(--collect-only -qq)
    timed "$step" "$until" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider -p xdist.plugin "${how[@]}" "$@"
    # Of the last line, such as "12 passed, 3 skipped in 4.56s".
    counts="$(grep -E '[0-9]+ (passed|failed|error|skipped)' "$RESULTS/$step.log" | tail -n 1 | sed 's/=//g; s/^ *//; s/ *$//')"
    case "$CODE$DRY $counts" in
        "0 "*passed*) record "$step" ok "$counts" ;;
        0--dry-run*) record "$step" dry "tests for a GPU can be collected" ;;
        124*) record "$step" FAILED "stopped at its time limit: ${counts:-nothing ended}; see $step.log" ;;
        *) record "$step" FAILED "${counts:-pytest ended with $CODE}; see $step.log" ;;
    esac
}

# bench UNTIL NAME ARGUMENTS...: one benchmark; what it measured before its time limit stays.
bench() {
    local until="$1" step="$2" result=ok
    shift
    # In the last half minute nothing begins that could take as long.
    local how=("$@" --device cuda --minutes "$(awk "BEGIN { print ($until - $SECONDS - 30) / 60 }")")
    if [ -n "$DRY" ]; then
        dry_launches "$step" "$until" bench "$@" || return
        result=dry how=("$step" --device cpu --geometry smollm2 --lengths 64 200 --repeats 1)
    fi
    timed "$step" "$until" "$PYTHON" -m nc_patch bench "${how[@]}" --out "$RESULTS"
    case $CODE in
        0) record "$step" "$result" "see $step.log and $step.json" ;;
        124) record "$step" stopped "at its time limit; what was measured is in $step.json" ;;
        *) record "$step" FAILED "ended with $CODE; see $step.log" ;;
    esac
}

# dry_launches STEP UNTIL WHAT...: everything that a step launches, on a GPU that is not there.
dry_launches() {
    timed "$1" "$2" "$PYTHON" tests/pretended_gpu.py "${@:3}"
    [ "$CODE" -ne 0 ] || return 0
    record "$1" FAILED "a launch for a GPU that is not there ended with $CODE; see $1.log"
    return 1
}

run_sanitizer() {
    local findings
    if [ -n "$DRY" ]; then
        dry_launches sanitizer "$1" small && record sanitizer dry "see sanitizer.log"
    elif ! command -v compute-sanitizer >/dev/null; then
        TOOK=0 record sanitizer "not run" "compute-sanitizer is not there"
    else
        # Every tensor has an allocation of its own, so that reads beyond one show.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timed sanitizer "$1" \
            compute-sanitizer --tool memcheck --error-exitcode 99 "$PYTHON" scripts/small_attention.py
        findings="$(grep 'ERROR SUMMARY' "$RESULTS/sanitizer.log" | tail -n 1)"
        case $CODE in
            0) record sanitizer ok "$findings" ;;
            99) record sanitizer FAILED "$findings; see sanitizer.log" ;;
            *) record sanitizer "not run" "ended with $CODE without a finding; see sanitizer.log" ;;
        esac
    fi
}

check_environment
if [ -z "$DRY" ] && grep -q '^gpu none' "$RESULTS/machine.txt"; then
    echo "There is no GPU here: this is a dry run."
    DRY=--dry-run
fi
[ -z "$DRY" ] || hide_other_packages
# What matters most comes first; time that a step leaves over goes to the next.
if [ "$PART" = prefill ]; then
    GLOBIGNORE=tests/test_triton_graphs.py
    run_tests tests 205 tests/test_triton_*.py
    bench 345 "${PREFILL[@]}"
else
    run_tests graphs 120 tests/test_triton_graphs.py
    bench 245 "${DECODE[@]}"
    run_sanitizer 345
fi
tar -C "$(dirname "$RESULTS")" -czf "$RESULTS.tar.gz" "$(basename "$RESULTS")" && rm -r "$RESULTS"
printf '\n== summary, beside %s\n' "$RESULTS.tar.gz"
cat "$RESULTS.txt"
exit "$STATUS"
