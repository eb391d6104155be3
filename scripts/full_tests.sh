#!/usr/bin/env bash
# Every test, the wide sweeps too, which scripts/test.sh leaves out for their time. Arguments go to pytest.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/test.sh" -m "" "$@"
