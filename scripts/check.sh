#!/usr/bin/env bash
# Style, imports between layers, and SGLang's seams.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/python -m pytest -q tests/contract
