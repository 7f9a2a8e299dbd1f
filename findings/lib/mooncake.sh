# Sourced by the findings about Mooncake's store.  `mooncake DIR` installs it in DIR, with the Debian libraries that its
# wheel leaves to the system unless they are there; `run_mooncake DIR` runs DIR/run.py beside a master of its own.
mooncake() {
  "${PYTHON:-python3}" -m venv "$1/venv"
  "$1/venv/bin/python" -m pip --disable-pip-version-check install --quiet mooncake-transfer-engine-non-cuda==0.3.13.post1
  if ! ldconfig -p | grep -q libibverbs.so.1; then
    mkdir "$1/debian"
    (cd "$1/debian" && apt-get download libibverbs1 libnl-3-200 libnl-route-3-200 >/dev/null 2>&1) || {
      echo "libibverbs1 is neither installed nor to be had from apt" >&2; exit 1; }
    for package in "$1"/debian/*.deb; do dpkg-deb -x "$package" "$1/debian"; done
    local folders
    folders=$(find "$1/debian" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
    export LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  fi
  cat > "$1/store.py" <<'PY'
import contextlib
import os
import time

from mooncake.store import MooncakeDistributedStore


@contextlib.contextmanager
def client(local_buffer_size):
    """A client over TCP that lends the store 64 MB."""
    for _ in range(20):
        store = MooncakeDistributedStore()
        if store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, local_buffer_size, "tcp", "",
                       f"127.0.0.1:{os.environ['MASTER_PORT']}") == 0:
            break
        time.sleep(0.5)
    else:
        raise SystemExit("no client could be set up")
    yield store
    store.close()
PY
}

run_mooncake() {
  local ports master status=0
  ports=$("$1/venv/bin/python" -c '
import socket
a, b = socket.socket(), socket.socket()
a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
  MASTER_PORT=${ports% *} "$1/venv/bin/mooncake_master" --rpc_port="${ports% *}" --metrics_port="${ports#* }" \
    > "$1/master.log" 2>&1 &
  master=$!
  MASTER_PORT=${ports% *} "$1/venv/bin/python" "$1/run.py" 2> "$1/client.log" || status=$?
  kill "$master"
  wait "$master" || true
  [ "$status" = 0 ] || grep -v '^[IW][0-9]' "$1/client.log" >&2 || true
  return "$status"
}
