"""Our pages stand beside /metrics in SGLang's own app when our backend serves, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

# In a process of its own: loading plug-ins patches SGLang for good, and the client must know its folder before.
_LOOK = """
import kvshare_sched.metrics
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
    kvshare_sched.metrics.ShareMetrics() if backend else None
    print(backend, *(client.get(path, headers=browser).status_code for path in ("/metrics", "/kvshare/")))
print("Index and pool" in client.get("/kvshare/", headers=browser).text)
"""


def test_pages_in_sglangs_app(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", _LOOK], env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines()[-3:] == ["None 200 404", "kvshare 200 200", "True"], found.stderr[-2000:]
