#!/usr/bin/env bash
# sglang-router 0.3.2: SGLang's own request fields pass on /v1/completions and are dropped on /v1/chat/completions.
#
# Expected: SGLang takes `priority`, `rid` and `custom_params` in the body of both routes, and its own router, which
#   forwards requests, passes both on alike, or refuses what it does not know.
# Happens: on the chat route the body is read into a fixed structure and written anew. The three fields are gone when it
#   reaches the worker, `max_tokens` has become `max_completion_tokens`, and the client gets its 200. `metadata` stays.
#   On the completions route all of them arrive.
# Matters: an option of an extension that travels in the body works against one engine and in tests, and is without
#   effect for chat clients as soon as a router stands in front. A header or `metadata` survives.
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
FIELDS = {"priority": 7, "rid": "order-17", "custom_params": {"mode": "exact"}, "metadata": {"team": "a"}}
with Router() as router:
    arrived = {}
    for route, prompt in [("completions", {"prompt": "Hello"}),
                          ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})]:
        body = {"model": "m", "max_tokens": 4, **prompt, **FIELDS}
        status, _ = router.call("POST", f"/v1/{route}", body)
        (got,) = [request for worker in router.workers for request in worker.requests]
        for worker in router.workers:
            worker.requests.clear()
        arrived[route] = sorted(name for name in FIELDS if got.get(name) == FIELDS[name])
        print(f"/v1/{route}: {status}, of {sorted(FIELDS)} the worker got {arrived[route]}")
        assert status == 200
assert arrived["completions"] == sorted(FIELDS), "changed: what the completions route passes"
assert arrived["chat/completions"] == ["metadata"], "changed: what the chat route passes"
PY
PYTHONPATH=$here/lib "$dir/venv/bin/python" "$dir/run.py"
