#!/usr/bin/env bash
# mooncake-transfer-engine-non-cuda 0.3.13.post1: get() of an object larger than the client's buffer says "nothing there".
#
# Expected: an object that is in the store, of which `is_exist` says 1 and `get_size` its length, comes back from
#   `get`, or `get` raises or says why not.
# Happens: `get` goes through the client's local buffer (16 MB as SGLang sets it up). Of a larger object it returns b"", the
#   same as for a key that does not exist. `get_into` with a buffer of one's own fetches the same object in full.
# Matters: KV of a long prompt outgrows the buffer. A cache on top of `get` takes what it has stored for a miss and computes
#   it again, for ever, and its hit rate says that long prompts never repeat.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/mooncake.sh"
mooncake "$dir"

cat > "$dir/run.py" <<'PY'
import ctypes
from importlib.metadata import version

from store import client

print("mooncake-transfer-engine-non-cuda", version("mooncake-transfer-engine-non-cuda"))
BUFFER, SIZE = 4 << 20, 8 << 20
with client(BUFFER) as store:
    own = (ctypes.c_ubyte * SIZE)()
    own[SIZE - 1] = 9
    address = ctypes.addressof(own)
    assert store.register_buffer(address, SIZE) == 0
    assert store.put("small", b"kv") == 0 and store.put_from("large", address, SIZE) == 0
    print("get of 2 bytes:", store.get("small"), "- of a missing key:", store.get("missing"))
    print(f"of {SIZE} bytes with a local buffer of {BUFFER}: is_exist {store.is_exist('large')},",
          f"get_size {store.get_size('large')}, get {store.get('large')}")
    own[SIZE - 1] = 0
    fetched = store.get_into("large", address, SIZE)
    print("get_into:", fetched, "bytes, the last of them", own[SIZE - 1])
    assert store.get("small") == b"kv" and store.is_exist("large") == 1 and store.get_size("large") == SIZE
    assert fetched == SIZE and own[SIZE - 1] == 9, "changed: get_into"
    assert store.get("large") == store.get("missing") == b"", "changed: get of a large object"
PY
run_mooncake "$dir"
