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
PYTHON="${PYTHON:-python3}" DRY='' PART='' OUT=''
MODEL=(--geometry llama3-8b --dtype bfloat16 --lengths 32768 131072 524288)

fail() {
    printf 'gpu_check.sh: %s\n' "$*" >&2
    exit 2
}

for argument in "$@"; do
    case "$argument" in
        --dry-run) DRY=--dry-run ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        -*) fail "unknown option $argument; allowed are --dry-run and --help" ;;
        prefill | decode) [ -z "$PART$OUT" ] && PART="$argument" || fail "one PART is enough, and OUT comes after it" ;;
        *) [ -z "$OUT" ] && OUT="$argument" || fail "one OUT is enough, got $OUT and $argument" ;;
    esac
done
OUT="${OUT:-$ROOT/runs/gpu_check}"
STATUS=0
if [ -z "$PART" ]; then
    for part in prefill decode; do
        "${BASH_SOURCE[0]}" $DRY "$part" "$OUT" || STATUS=$?
        [ $STATUS -ne 2 ] || break
    done
    exit $STATUS
fi
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run"
[[ "$PYTHON" != */* ]] || PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
RESULTS="$(mkdir -p "$OUT" && cd "$OUT" && pwd)" || fail "OUT=$OUT cannot be written"
RESULTS="$RESULTS/gpu_check_$PART"
{ rm -rf "$RESULTS" && mkdir "$RESULTS" && : >"$RESULTS.txt"; } || fail "OUT=$OUT cannot be written"
cd "$ROOT" || exit 2
# Only what is asked for is loaded into pytest, whatever else is installed.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# record STEP RESULT WHAT: one line of the summary; the result FAILED makes the whole check fail.
record() {
    printf '%-9s %-8s %4s s  %s\n' "$1" "$2" "$TOOK" "$3" >>"$RESULTS.txt"
    [ "$2" != FAILED ] || STATUS=1
}

# timed STEP UNTIL COMMAND...: runs the command, its output in STEP.log too, and interrupts it when the check has run for
# UNTIL seconds, or a dry run for an hour; sets TOOK, CODE (124 where it was interrupted) and LOG.
timed() {
    local begin=$SECONDS limit=$(($2 - SECONDS))
    LOG="$1.log"
    [ -z "$DRY" ] || limit=3600
    printf '\n== %s, %s s at most: %s\n' "$1" "$limit" "${*:3}"
    timeout -s INT -k 15 $((limit > 1 ? limit : 1)) "${@:3}" 2>&1 | tee -a "$RESULTS/$LOG"
    CODE=${PIPESTATUS[0]} TOOK=$((SECONDS - begin))
    [ "$CODE" -ne 137 ] || CODE=124 # it did not end when it was interrupted, and was killed
}

# dry_launches STEP WHAT...: everything that a step launches, on a GPU that is not there.
dry_launches() {
    timed "$1" 0 "$PYTHON" tests/pretended_gpu.py "${@:2}"
    [ "$CODE" -eq 0 ] || record "$1" FAILED "a launch for a GPU that is not there ended with $CODE; see $LOG"
    return "$CODE"
}

# run_tests STEP UNTIL FILES...: over all cores but two, in processes of which one that breaks its GPU is replaced.
run_tests() {
    local workers=$(($(nproc) - 2)) counts
    # Where a test hangs is printed after 90 s.
    local how=(-n "$((workers < 1 ? 1 : workers > 16 ? 16 : workers))" --dist worksteal -rsfE --durations=10)
    [ -z "$DRY" ] || how=(--collect-only -qq)
    timed "$1" "$2" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider -p xdist.plugin "${how[@]}" \
        -o faulthandler_timeout=90 "${@:3}"
    # Of the last line, such as "12 passed, 3 skipped in 4.56s".
    counts="$(grep -oE '[0-9]+ (passed|failed|error|skipped).*[^= ]' "$RESULTS/$LOG" | tail -n 1)"
    case "$CODE$DRY $counts" in
        "0 "*passed*) record "$1" ok "$counts" ;;
        0--dry-run*) record "$1" dry "tests for a GPU can be collected" ;;
        124*) record "$1" FAILED "stopped at its time limit: ${counts:-nothing ended}; see $LOG" ;;
        *) record "$1" FAILED "${counts:-pytest ended with $CODE}; see $LOG" ;;
    esac
}

# bench UNTIL NAME ARGUMENTS...: one benchmark; what it measured before its time limit stays.
bench() {
    # In the last half minute nothing begins that could take as long.
    local how=("${@:2}" --device cuda --minutes "$(awk "BEGIN { print ($1 - $SECONDS - 30) / 60 }")")
    if [ -n "$DRY" ]; then
        dry_launches "$2" bench "${@:2}" || return
        how=("$2" --device cpu --geometry smollm2 --lengths 64 200 --repeats 1)
    fi
    timed "$2" "$1" "$PYTHON" -m nc_patch bench "${how[@]}" --out "$RESULTS"
    case $CODE in
        0) record "$2" "$([ -n "$DRY" ] && echo dry || echo ok)" "see $LOG and $2.json" ;;
        124) record "$2" stopped "at its time limit; what was measured is in $2.json" ;;
        *) record "$2" FAILED "ended with $CODE; see $LOG" ;;
    esac
}

run_sanitizer() {
    local found
    if [ -n "$DRY" ]; then
        dry_launches sanitizer small && record sanitizer dry "see $LOG"
    elif ! command -v compute-sanitizer >/dev/null; then
        TOOK=0 record sanitizer "not run" "compute-sanitizer is not there"
    else
        # Every tensor has an allocation of its own, so that reads beyond one show.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timed sanitizer "$1" \
            compute-sanitizer --tool memcheck --error-exitcode 99 "$PYTHON" scripts/small_attention.py
        found="$(grep 'ERROR SUMMARY' "$RESULTS/$LOG" | tail -n 1)"
        case $CODE in
            0) record sanitizer ok "$found" ;;
            99) record sanitizer FAILED "$found; see $LOG" ;;
            *) record sanitizer "not run" "ended with $CODE without a finding; see $LOG" ;;
        esac
    fi
}

"$PYTHON" - >"$RESULTS/machine.txt" <<'PY' || fail "$PYTHON lacks what is needed; choose another with PYTHON=/path/to/python"
import sys
import matplotlib, numpy, pandas, psutil, pytest, torch, transformers, triton, xdist
print("python", sys.version.split()[0], sys.executable)
for package in (torch, triton, transformers, matplotlib, numpy, pandas, psutil, pytest, xdist):
    print(package.__name__, package.__version__)
print("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
PY
cat "$RESULTS/machine.txt"
if [ -z "$DRY" ] && grep -q '^gpu none' "$RESULTS/machine.txt"; then
    echo "There is no GPU here: this is a dry run."
    DRY=--dry-run
fi
if [ -n "$DRY" ]; then
    # Modules of other packages look as if they were not installed, so that what needs them shows.
    mkdir "$RESULTS/hidden"
    echo 'import sys; sys.modules |= dict.fromkeys(
    "accelerate datasets evaluate gguf hypothesis lm_eval peft".split())' >"$RESULTS/hidden/sitecustomize.py"
    PYTHONPATH="$RESULTS/hidden:$PYTHONPATH"
else
    nvidia-smi >>"$RESULTS/machine.txt" 2>&1
fi
# What matters most comes first; time that a step leaves over goes to the next.
if [ "$PART" = prefill ]; then
    GLOBIGNORE=tests/test_triton_graphs.py
    run_tests tests 205 tests/test_{attention,paged,triton_*}.py
    bench 345 prefill "${MODEL[@]}" --selections block
else
    run_tests graphs 120 tests/test_triton_graphs.py
    bench 245 decode "${MODEL[@]}" --selections topk block --batch 1 8
    run_sanitizer 345
fi
tar -C "$(dirname "$RESULTS")" -czf "$RESULTS.tar.gz" "$(basename "$RESULTS")" && rm -r "$RESULTS"
printf '\n== summary, beside %s\n' "$RESULTS.tar.gz"
cat "$RESULTS.txt"
exit "$STATUS"
