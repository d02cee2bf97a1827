#!/usr/bin/env bash
# What only a GPU can show, in one command under nine minutes; not part of CI. Prints JSON Lines.
#   bash tests/gpu/run.sh [FILE]     FILE: also append the figures there
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
python3 -u tests/gpu/figures.py | tee -a "${1:-/dev/null}"
