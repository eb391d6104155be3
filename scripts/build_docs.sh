#!/usr/bin/env bash
# Sets .venv up and builds the documentation into site/. Fails at a broken link, or at a page that the navigation lacks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env docs
exec .venv/bin/mkdocs build --strict
