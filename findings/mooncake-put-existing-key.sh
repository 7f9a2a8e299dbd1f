#!/usr/bin/env bash
# mooncake-transfer-engine-non-cuda 0.3.13.post1: put() of a key that exists answers 0 and keeps the old value.
#
# Expected: a `put` that returns 0 has stored what it was given, as in other key-value stores, or is refused with one of
#   the store's many error codes.
# Happens: of a key that exists the first value stays, whatever its length, and the second `put` returns 0 like the
#   first. Only the master's log has a line about it.
# Matters: KV is only right for the weights that computed it. Who writes new KV under a key made of the tokens, after an
#   update of the weights, believes that it is stored and serves the old one; keys must carry a version.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/mooncake.sh"
mooncake "$dir"

cat > "$dir/run.py" <<'PY'
from importlib.metadata import version

from store import client

print("mooncake-transfer-engine-non-cuda", version("mooncake-transfer-engine-non-cuda"))
with client(4 << 20) as store:
    results = []
    for value in (b"first", b"a second and longer value"):
        answer = store.put("key", value)
        results.append((answer, store.get("key")))
        print(f"put of {value}: {answer}; get: {results[-1][1]}")
    other = store.put("other key", b"a second and longer value")
    print("put of another key:", other, "get:", store.get("other key"))
    assert other == 0 and store.get("other key") == b"a second and longer value"
    assert results == [(0, b"first"), (0, b"first")], "changed: put of a key that exists"
PY
run_mooncake "$dir"
