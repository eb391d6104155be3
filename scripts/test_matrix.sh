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
core=(tests/test_{attention,blocks,cache,config,cpu,interpreter,masks,patch,selection,stats,steps,triton_compile}.py
    tests/test_ways.py tests/test_ways_{compile,masks,training}.py)
[ $# -eq 0 ] || core=("$@")
export FILES="$*" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}" COMMIT
COMMIT="$(git rev-parse HEAD)$([ -z "$(git status --porcelain --untracked-files=no)" ] || echo -dirty)"

# record TORCH TRITON TRANSFORMERS OUTCOME SECONDS WHAT [PACKAGE==VERSION...]: one combination into the file.
record() {
    "$base" - "$out" "$@" <<'PY'
import json, os, pathlib, platform, re, sys

path, (torch, triton, transformers, outcome, seconds, what, *versions) = pathlib.Path(sys.argv[1]), sys.argv[2:]
versions = dict(version.split("==", 1) for version in versions)
cell = {"python": platform.python_version(), "torch": torch, "triton": versions.get("triton", triton)}
cell |= {"transformers": transformers, "files": os.environ["FILES"].split()}
key = lambda cell: [[int(n) for n in re.findall(r"\d+", cell[name])] for name in ("torch", "transformers", "triton", "python")] + [cell.get("files", [])]
counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", what)}
result = {"outcome": outcome, "seconds": int(seconds), "commit": os.environ["COMMIT"], "versions": versions}
result |= {"tests": counts} if counts else {"reason": what}
cells = [c for c in json.loads(path.read_text())["cells"] if key(c) != key(cell)] if path.exists() else []
hardware = {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
about = {"command": "scripts/test_matrix.sh", "hardware": hardware}
path.write_text(json.dumps({**about, "cells": sorted([*cells, cell | result], key=key)}, indent=1) + "\n")
PY
}

# install PACKAGE...: into $environment; on failure $why is the first line of pip's complaint.
install() {
    local said
    why=""
    said="$("$environment/bin/python" -m pip --disable-pip-version-check install -q "$@" 2>&1)" ||
        why="$(grep -m 1 -E '^ERROR' <<<"$said" | sed 's/ (from versions:.*//' | cut -c 1-300)"
    [ -z "$why" ]
}

# prepare TORCH TRITON: makes $environment hold them; on failure $why says what could not be had.
prepare() {
    local pinned="triton==$2"
    why=""
    "$environment/bin/python" -c 'import sys, torch, triton
sys.exit(torch.__version__.split("+")[0] != sys.argv[1] or sys.argv[2] not in ("own", triton.__version__))' "$@" 2>/dev/null && return
    rm -rf "$environment"
    "$base" -m venv "$environment" || exit 1
    # CPU builds do not bring Triton, whose interpreter and compiler the tests use all the same.
    [ "$2" != own ] || pinned="$(grep -E '^triton==' constraints.txt)"
    install "torch==$1+cpu" "$pinned" && return
    if [ "${NC_MATRIX_CUDA:-}" != 1 ]; then
        why="no CPU build of torch $1 is to be had ($why); NC_MATRIX_CUDA=1 takes one with CUDA"
    elif install "torch==$1" && [ "$2" != own ]; then
        install "triton==$2" # pip says that PyTorch asks for another Triton, and installs it
    fi
}

base="${PYTHON:-$(nc_find_python)}" || exit 1
python="$("$base" -c 'import sys; print("python-%d.%d" % sys.version_info[:2])')"
mkdir -p "$home" "$(dirname "$out")" || exit 1
failed=0
for torch in "${torches[@]}"; do for triton in "${tritons[@]}"; do
    environment="$home/$python-torch-$torch$([ "$triton" = own ] || echo "-triton-$triton")"
    prepare "$torch" "$triton"
    missing="$why"
    # Triton's interpreter, which only tests use, runs with numpy 2.4 since its version 3.7.
    numpy="$("$environment/bin/python" -c 'import triton
print("numpy" if [*map(int, triton.__version__.split(".")[:2])] >= [3, 7] else "numpy<2.4")' 2>/dev/null)"
    for release in "${releases[@]}"; do
        combination="$python, torch $torch, triton $triton, transformers $release"
        why="$missing"
        if [ -n "$why" ] || ! install "transformers==$release" "$numpy" hypothesis numba psutil pytest; then
            echo "$combination: not installed: $why"
            record "$torch" "$triton" "$release" "not installed" 0 "$why"
            failed=1
            continue
        fi
        log="$environment-transformers-$release.log" started=$SECONDS outcome=passed
        if ! "$environment/bin/python" -m pytest -q -p no:cacheprovider "${core[@]}" >"$log" 2>&1; then
            outcome=failed failed=1
            grep -E '^(FAILED|ERROR)' "$log"
        fi
        summary="$(tail -n 1 "$log")"
        echo "$combination: $outcome: $summary ($log)"
        read -ra versions < <("$environment/bin/python" -m pip freeze --disable-pip-version-check | grep -E '^(torch|triton|transformers|tokenizers|numpy)==' | xargs)
        record "$torch" "$triton" "$release" "$outcome" $((SECONDS - started)) "$summary" "${versions[@]}"
    done
done; done
echo "Results: $out"
exit $failed
