#!/usr/bin/env bash
# Installs what is missing and runs the checks: style, types, tests. --full adds the long cases.
#
#   bash launch/test.sh [--full] [--minutes N] [pytest arguments]
#
# --minutes N: the most telling tests first, none is started after N minutes, and what was left out is listed.
# One pytest process per core, at most four. A test file is never split, so its fixtures are built once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_kmem dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=cpu

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
