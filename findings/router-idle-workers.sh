#!/usr/bin/env bash
# sglang-router 0.3.2: of two idle workers, cache_aware uses only one, also for prompts that have nothing in common.
#
# Expected: the default policy, cache_aware, sends a prompt to the worker that knows its beginning and spreads prompts that
#   nobody knows, so a dozen unrelated prompts, one after the other, land on both workers.
# Happens: all twelve go to one worker. While each answer is there before the next request comes, both workers look alike to
#   the policy for a prompt that neither knows, and the same one is taken every time. round_robin uses both.
# Matters: on a quiet service, in a demonstration or in a test of reuse across engines, the second engine stays cold and
#   the first one's memory alone is used: figures for "two engines" are figures for one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --disable-pip-version-check install --quiet sglang-router==0.3.2

cat > "$dir/run.py" <<'PY'
from importlib.metadata import version

from router import Router

print("sglang-router", version("sglang-router"))
counts = {}
for policy in ("cache_aware", "round_robin"):
    with Router("--policy", policy) as router:
        for number in range(12):
            prompt = " ".join(f"{number * 997 + word * 31:x}" for word in range(200))
            status, _ = router.call("POST", "/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 4})
            assert status == 200
        counts[policy] = sorted(len(worker.requests) for worker in router.workers)
        print(f"{policy}: requests seen by the two workers {counts[policy]}")
assert counts["round_robin"] == [6, 6], "changed: both workers serve"
assert counts["cache_aware"] == [0, 12], "changed: unrelated prompts are spread over idle workers"
PY
PYTHONPATH=$here/lib "$dir/venv/bin/python" "$dir/run.py"
