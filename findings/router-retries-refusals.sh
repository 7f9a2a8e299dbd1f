#!/usr/bin/env bash
# sglang-router 0.3.2: a worker's 429 with `Retry-After: 30` is asked again four times within a few seconds.
#
# Expected: a worker that answers 429 and says when to come back is left alone until then: the router hands the answer on
#   to the client, or tries another worker at most.
# Happens: with its defaults the router repeats the request, Retry-After or not, until the worker has refused it five
#   times, every time at the same worker although the other one is idle (the cache_aware policy names it again). Only
#   then the client gets its one 429.
# Matters: an extension that limits a tenant's requests counts one request of a client five times, and its answer is
#   later by all the waiting between. Behind this router either retries are off or refusals have another status.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --disable-pip-version-check install --quiet sglang-router==0.3.2

cat > "$dir/run.py" <<'PY'
import time
from importlib.metadata import version

from router import Router

print("sglang-router", version("sglang-router"))


def refuse(path, body):
    return 429, {"error": {"message": "come back in half a minute"}}, [("Retry-After", "30")]


counts = {}
for name, options in [("defaults", []), ("--disable-retries", ["--disable-retries"])]:
    with Router(*options, answer=refuse) as router:
        start = time.monotonic()
        status, _ = router.call("POST", "/v1/completions", {"model": "m", "prompt": "Hello", "max_tokens": 4})
        seconds = time.monotonic() - start
        counts[name] = sorted(len(worker.requests) for worker in router.workers)
        print(f"{name}: the client got {status} after {seconds:.1f} s; requests seen by the two workers {counts[name]}")
        assert status == 429 and seconds < 30, "changed: the client's answer"
assert counts["defaults"] == [0, 5], "changed: how often a refused worker is asked"
assert counts["--disable-retries"] == [0, 1], "changed: a refusal without retries"
PY
PYTHONPATH=$here/lib "$dir/venv/bin/python" "$dir/run.py"
