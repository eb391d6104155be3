#!/usr/bin/env bash
# Runs the core tests with the oldest and the newest supported PyTorch and transformers, each in an environment of its own
# below .matrix/, and writes docs/results/matrix.json (or $OUT). What cannot be installed is said by name, in the file too.
#   scripts/test_matrix.sh                                     every pair of TORCH and TRANSFORMERS below
#   TORCH="2.13.0" TRANSFORMERS="5.17.0" scripts/test_matrix.sh tests/test_config.py     one pair, one file
# PyTorch comes as a CPU build (X+cpu), from where pip is told to look: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS.
# NC_MATRIX_CUDA=1 takes builds with CUDA where there is none for the CPU, some gigabytes each.
# A pair replaces its entry in the file; others stay.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

read -ra torches <<<"${TORCH:-2.11.0 2.12.0 2.13.0}"
read -ra releases <<<"${TRANSFORMERS:-5.17.0 5.23.0 5.24.0}"
out="${OUT:-docs/results/matrix.json}"
home="${NC_MATRIX_DIR:-.matrix}"
# What a change in PyTorch or transformers can break: settings need neither, kernels have scripts/gpu_check.sh.
core=(tests/test_{blocks,cache,config,consistency,functional,patch,reference,stats,tail,visibility}.py
    tests/test_torch_{block,decode,ops}.py tests/test_triton_{compile,kernels}.py
    tests/test_ways_{batches,compile,generate,precision}.py)
[ $# -eq 0 ] || core=("$@")
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"

# record TORCH TRANSFORMERS OUTCOME SECONDS WHAT: one pair into the file.
record() {
    "$base" - "$out" "$@" <<'PY'
import json, os, pathlib, platform, re, subprocess, sys

out, torch, transformers, outcome, seconds, what, *versions = sys.argv[1:]
path = pathlib.Path(out)
git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True).stdout.strip()
commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
cell = {"torch": torch, "transformers": transformers, "outcome": outcome, "seconds": int(seconds), "commit": commit}
counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", what)}
cell |= {"tests": counts} if counts else {"reason": what}
cell |= {"versions": dict(v.split("==", 1) for v in versions)} if versions else {}
record = json.loads(path.read_text()) if path.exists() else {"cells": []}
others = [c for c in record["cells"] if (c["torch"], c["transformers"]) != (torch, transformers)]
key = lambda c: [[int(n) for n in re.findall(r"\d+", c[name])] for name in ("torch", "transformers")]
record = {
    "command": "scripts/test_matrix.sh",
    "hardware": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    "cells": sorted([*others, cell], key=key),
}
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(record, indent=1) + "\n")
PY
}

# install ENVIRONMENT PACKAGE...: with the pinned versions of all that the matrix does not vary.
install() {
    local environment="$1"
    shift
    "$environment/bin/python" -m pip --disable-pip-version-check install -q -c "$home/constraints.txt" "$@" 2>&1
}

# The first line of pip's complaint, as a reason.
complaint() {
    grep -m 1 -E '^ERROR' <<<"$1" | sed 's/ (from versions:.*//' | cut -c 1-300
}

base="$(nc_find_python)" || exit 1
mkdir -p "$home" || exit 1
grep -viE '^(torch|triton|numpy|transformers|tokenizers|huggingface_hub|hf-xet|safetensors|setuptools)==' constraints.txt >"$home/constraints.txt"
triton="$(grep -E '^triton==' constraints.txt)"
failed=0
for torch in "${torches[@]}"; do
    environment="$home/torch-$torch"
    why=""
    if ! "$environment/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null; then
        rm -rf "$environment"
        "$base" -m venv "$environment" || exit 1
        if ! said="$(install "$environment" "torch==$torch+cpu")"; then
            why="no CPU build of torch $torch is to be had ($(complaint "$said")); NC_MATRIX_CUDA=1 takes one with CUDA"
            if [ "${NC_MATRIX_CUDA:-}" = 1 ]; then
                if said="$(install "$environment" "torch==$torch")"; then why=""; else why="$(complaint "$said")"; fi
            fi
        fi
    fi
    # CPU builds do not bring Triton, whose interpreter and compiler the tests use all the same.
    if [ -z "$why" ] && ! "$environment/bin/python" -c 'import triton' 2>/dev/null; then
        said="$(install "$environment" "$triton")" || why="$(complaint "$said")"
    fi
    # Triton's interpreter runs with numpy 2.4 since its version 3.7.
    numpy="$(grep -E '^numpy==' constraints.txt)"
    if "$environment/bin/python" -c 'import sys, triton; sys.exit([*map(int, triton.__version__.split(".")[:2])] >= [3, 7])' 2>/dev/null; then
        numpy="numpy<2.4"
    fi
    for release in "${releases[@]}"; do
        pair="torch $torch, transformers $release"
        if [ -z "$why" ] && ! said="$(install "$environment" "transformers==$release" "$numpy" hypothesis psutil pytest)"; then
            reason="$(complaint "$said")"
        else
            reason="$why"
        fi
        if [ -n "$reason" ]; then
            echo "$pair: not installed: $reason"
            record "$torch" "$release" "not installed" 0 "$reason"
            failed=1
            continue
        fi
        started=$SECONDS
        log="$home/torch-$torch-transformers-$release.log"
        "$environment/bin/python" -m pytest -q -p no:cacheprovider "${core[@]}" >"$log" 2>&1
        code=$?
        summary="$(tail -n 1 "$log")"
        outcome=passed
        if [ $code -ne 0 ]; then
            outcome=failed failed=1
            grep -E '^(FAILED|ERROR)' "$log"
        fi
        echo "$pair: $outcome: $summary ($log)"
        read -ra versions < <("$environment/bin/python" -m pip freeze --disable-pip-version-check | grep -E '^(torch|triton|transformers|tokenizers|numpy)==' | xargs)
        record "$torch" "$release" "$outcome" $((SECONDS - started)) "$summary" "${versions[@]}"
    done
done
echo "Results: $out"
exit $failed
