"""The pages in a headless Chromium that can reach nothing but this machine: they need no internet and run no script."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading

import pytest
from engine import move
from prometheus_client import CollectorRegistry

from kvshare_sched.engine.sglang.http import pages as http_pages
from kvshare_sched.observe import server_state
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason

RUNS = [{"origin": "exact", "start": 0, "length": 10}, {"origin": "fresh", "start": 10, "length": 30}]
RECORD = {
    "rid": "r1",
    "report": ShareReport(10, 0, 0, 30, Outcome.ORDINARY, Reason.SHORT).to_json(),
    "details": {"extra_key": "blue", "cache_salt": "", "ratio": 0.18, "runs": RUNS},
}


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium: apt-get install --no-install-recommends chromium")


@pytest.fixture(scope="module")
def url():
    registry = CollectorRegistry()
    move(ShareMetrics(registry=registry), 1)
    shown = {"/": http_pages.live_page(server_state.State(server_state.samples_of(registry.collect())), [RECORD])}
    shown["/?rid=r1"] = http_pages.request_page(RECORD)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in {"content-type": "text/html; charset=utf-8", **http_pages.HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(shown.get(self.path, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def look(browser: str, url: str) -> subprocess.CompletedProcess:
    """The page's tree on stdout, the browser's complaints on stderr."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command = [browser, *flags, "--enable-logging=stderr", "--dump-dom", url]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-500:]
    return found


def test_the_live_page(browser, url):
    text = look(browser, url).stdout
    assert "<td>blue</td>" in text and 'href="?rid=r1"' in text and "<script" not in text


def test_a_request(browser, url):
    found = look(browser, f"{url}/?rid=r1")
    assert '<span class="fresh" style="flex:30"' in found.stdout and "Request r1" in found.stdout
    assert "Content Security Policy" not in found.stderr, "the browser refused a style"
