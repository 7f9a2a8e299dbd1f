#!/usr/bin/env bash
# Style: format and lint. Import rules and SGLang's seams are in tests/contract, which `make test` runs.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
