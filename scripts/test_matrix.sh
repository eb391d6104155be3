#!/usr/bin/env bash
# Runs the core tests with the oldest and the newest supported versions, each combination in an environment of its own below
# .matrix/, and writes docs/results/matrix.json (or $OUT). What cannot be installed is said by name, in the file too.
#   scripts/test_matrix.sh                                     every pair of TORCH and TRANSFORMERS below
#   TORCH="2.13.0" TRITON="3.9.0" TRANSFORMERS="5.17.0" scripts/test_matrix.sh tests/test_config.py     one, one file
# PYTHON=/path/to/python chooses the interpreter. TRITON is the one that PyTorch asks for unless it is given; of all else the
# newest is taken, as a new installation would. PyTorch comes as a CPU build (X+cpu), from where pip is told to look:
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS. NC_MATRIX_CUDA=1 takes builds with CUDA where there is none for the CPU, some gigabytes
# each. A combination replaces its entry in the file; others stay. Where files are given, the entry is of these and names them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

read -ra torches <<<"${TORCH:-2.11.0 2.13.0 2.15.0}"
read -ra tritons <<<"${TRITON:-own}"
read -ra releases <<<"${TRANSFORMERS:-5.17.0 5.23.0 5.24.0}"
out="${OUT:-docs/results/matrix.json}"
home="${NC_MATRIX_DIR:-.matrix}"
# What a change in PyTorch, Triton or transformers can break: settings need none of them, GPUs have scripts/gpu_check.sh.
core=(tests/test_{blocks,cache,config,consistency,functional,masks,patch,reference,stats,tail}.py
    tests/test_torch_{block,decode,ops}.py tests/test_triton_{compile,decode_block,kernels}.py
    tests/test_ways_{batches,compile,generate,masks,precision}.py)
[ $# -eq 0 ] || core=("$@")
export FILES="$*"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"

# record TORCH TRITON TRANSFORMERS OUTCOME SECONDS WHAT [VERSION...]: one combination into the file.
record() {
    "$base" - "$out" "$@" <<'PY'
import json, os, pathlib, platform, re, subprocess, sys

out, torch, triton, transformers, outcome, seconds, what, *versions = sys.argv[1:]
path = pathlib.Path(out)
git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True).stdout.strip()
commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
installed = dict(v.split("==", 1) for v in versions)
cell = {"python": platform.python_version(), "torch": torch, "triton": installed.get("triton", triton)}
cell |= {"transformers": transformers} | ({"files": os.environ["FILES"].split()} if os.environ["FILES"] else {})
cell |= {"outcome": outcome, "seconds": int(seconds), "commit": commit}
counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", what)}
cell |= {"tests": counts} if counts else {"reason": what}
cell |= {"versions": installed} if versions else {}
record = json.loads(path.read_text()) if path.exists() else {"cells": []}
number = lambda text: [int(n) for n in re.findall(r"\d+", text)]
key = lambda c: ([number(c[name]) for name in ("torch", "transformers", "triton", "python")], c.get("files", []))
record = {
    "command": "scripts/test_matrix.sh",
    "hardware": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    "cells": sorted([*(c for c in record["cells"] if key(c) != key(cell)), cell], key=key),
}
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(record, indent=1) + "\n")
PY
}

# install PACKAGE...: into $environment.
install() {
    "$environment/bin/python" -m pip --disable-pip-version-check install -q "$@" 2>&1
}

# The first line of pip's complaint, as a reason.
complaint() {
    grep -m 1 -E '^ERROR' <<<"$1" | sed 's/ (from versions:.*//' | cut -c 1-300
}

# Whether $environment holds PyTorch $1, and Triton $2 or any.
holds() {
    "$environment/bin/python" - "$@" <<'PY' 2>/dev/null
import sys, torch, triton

assert torch.__version__.split("+")[0] == sys.argv[1] and sys.argv[2] in ("own", triton.__version__)
PY
}

base="${PYTHON:-$(nc_find_python)}" || exit 1
python="$("$base" -c 'import sys; print("python-%d.%d" % sys.version_info[:2])')"
mkdir -p "$home" || exit 1
failed=0
for torch in "${torches[@]}"; do for triton in "${tritons[@]}"; do
    environment="$home/$python-torch-$torch$([ "$triton" = own ] || echo "-triton-$triton")"
    why=""
    if ! holds "$torch" "$triton"; then
        rm -rf "$environment"
        "$base" -m venv "$environment" || exit 1
        # CPU builds do not bring Triton, whose interpreter and compiler the tests use all the same.
        pinned="$([ "$triton" = own ] && grep -E '^triton==' constraints.txt || echo "triton==$triton")"
        if ! said="$(install "torch==$torch+cpu" "$pinned")"; then
            why="no CPU build of torch $torch is to be had ($(complaint "$said")); NC_MATRIX_CUDA=1 takes one with CUDA"
            if [ "${NC_MATRIX_CUDA:-}" = 1 ]; then
                if said="$(install "torch==$torch")"; then why=""; else why="$(complaint "$said")"; fi
                # pip says that PyTorch asks for another Triton, and installs it.
                [ -n "$why" ] || [ "$triton" = own ] || said="$(install "triton==$triton")" || why="$(complaint "$said")"
            fi
        fi
    fi
    # Triton's interpreter, which only tests use, runs with numpy 2.4 since its version 3.7.
    numpy="$("$environment/bin/python" -c 'import triton
print("numpy" if [*map(int, triton.__version__.split(".")[:2])] >= [3, 7] else "numpy<2.4")' 2>/dev/null)"
    for release in "${releases[@]}"; do
        combination="$python, torch $torch, triton $triton, transformers $release"
        if [ -z "$why" ] && ! said="$(install "transformers==$release" "$numpy" hypothesis psutil pytest)"; then
            reason="$(complaint "$said")"
        else
            reason="$why"
        fi
        if [ -n "$reason" ]; then
            echo "$combination: not installed: $reason"
            record "$torch" "$triton" "$release" "not installed" 0 "$reason"
            failed=1
            continue
        fi
        started=$SECONDS
        log="$environment-transformers-$release.log"
        "$environment/bin/python" -m pytest -q -p no:cacheprovider "${core[@]}" >"$log" 2>&1
        code=$?
        summary="$(tail -n 1 "$log")"
        outcome=passed
        if [ $code -ne 0 ]; then
            outcome=failed failed=1
            grep -E '^(FAILED|ERROR)' "$log"
        fi
        echo "$combination: $outcome: $summary ($log)"
        read -ra versions < <("$environment/bin/python" -m pip freeze --disable-pip-version-check | grep -E '^(torch|triton|transformers|tokenizers|numpy)==' | xargs)
        record "$torch" "$triton" "$release" "$outcome" $((SECONDS - started)) "$summary" "${versions[@]}"
    done
done; done
echo "Results: $out"
exit $failed
