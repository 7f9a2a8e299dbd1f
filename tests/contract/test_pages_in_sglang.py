"""Our pages stand beside /metrics in SGLang's own app when our backend serves, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

from kvshare_sched.tenants.identity import hash_of

# In a process of its own: loading plug-ins patches SGLang for good, and the client must know its folder before.
_LOOK = """
import kvshare_sched.observe.metrics
from sglang.srt.plugins import load_plugins
from sglang.srt.entrypoints import http_server
load_plugins()
import sglang.srt.runtime_context as context
from sglang.srt.server_args import ServerArgs
from starlette.testclient import TestClient
from types import SimpleNamespace

context.get_serving = lambda: SimpleNamespace(api_key=None, admin_api_key=None)
app, browser = http_server.app, {"accept": "text/html"}
client = TestClient(app)  # without its lifespan, which would need an engine
for backend in (None, "kvshare"):
    app.server_args = ServerArgs(model_path="/none", radix_cache_backend=backend)
    http_server.add_prometheus_middleware(app)
    kvshare_sched.observe.metrics.ShareMetrics() if backend else None
    print(backend, *(client.get(path, headers=browser).status_code for path in ("/metrics", "/kvshare/")))
print("Index and pool" in client.get("/kvshare/", headers=browser).text)

# The same behind the door of a tenants file: who is asking must reach handlers that run beside the event loop.
import sys
from kvshare_sched.observe import recent_requests
from kvshare_sched.tenants.middleware import Edge, Middleware
from kvshare_sched.tenants.namespaces import name_of
from kvshare_sched.tenants.reload import TenantsFile

details = {"extra_key": name_of("mark", "tenant", "acme"), "cache_salt": "", "ratio": 0.2, "runs": []}
recent_requests.requests.remember("mine", {"outcome": "ordinary"}, details)
client = TestClient(Middleware(app, Edge(TenantsFile(sys.argv[1], 1000, 1000), lambda: "mark")))
for key in ("root", "acme", "globex"):
    found = [client.get(path, headers={"x-api-key": key}) for path in ("/kvshare/", "/kvshare/requests/mine")]
    print(key, *(answer.status_code for answer in found))
"""
_FILE = f"""
unknown = "anonymous"
[operators]
keys = ["{hash_of("root")}"]
[tenants.acme]
keys = ["{hash_of("acme")}"]
[tenants.globex]
keys = ["{hash_of("globex")}"]
"""


def test_pages_in_sglangs_app(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    (tmp_path / "tenants.toml").write_text(_FILE)
    command = [sys.executable, "-c", _LOOK, str(tmp_path / "tenants.toml")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = found.stdout.splitlines()
    assert told[-6:-3] == ["None 200 404", "kvshare 200 200", "True"], found.stderr[-2000:]
    assert told[-3:] == ["root 200 200", "acme 403 200", "globex 403 404"], found.stderr[-2000:]
