"""A live server under a real Prometheus: three sources, one number; no panel is empty; requests explain themselves."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from harness import LOGS, SYSTEMS, chat, sections

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dashboards"))

import generate  # noqa: E402
import local_prometheus  # noqa: E402
import render  # noqa: E402

from kvshare_sched.cli import main  # noqa: E402
from kvshare_sched.series import ORIGINS, SERIES  # noqa: E402

ENVIRONMENT = {"KVSHARE_AUDIT_SHARE": "0.3", "KVSHARE_REPAIR_ROWS": "2"}
DOCS = sections()
TENANTS = ("blue", "green", "red")
EACH = 8  # requests of a tenant
WITH_FILE = [p["title"] for p in generate.boards()["tenants"]["rows"]["With a tenants file"]]  # the server has none
BROWSER = {"accept": "text/html"}


def load(server) -> list[dict]:
    """The answers of three tenants that read the same texts in ever other orders; one request in eight opts out."""
    picks = random.Random(1)
    asked = [(t, SYSTEMS[n % 3], picks.sample(DOCS[:6], 3), n) for n in range(EACH) for t in TENANTS]

    def ask(case) -> dict:
        tenant, system, parts, n = case
        body = server._body(chat(system, parts, f"Question {n}?"), 8, tenant, n % 8 != 7)
        return server.post("/generate", body).json()["meta_info"]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, asked))


@pytest.fixture(scope="module")
def played(server, tmp_path_factory):
    """(Prometheus, start, end, answers, the origins counted meanwhile)."""
    target = server.url.removeprefix("http://")
    before, started = server.origins(), time.time()
    with local_prometheus.scraping([target], tmp_path_factory.mktemp("prometheus")) as prometheus:
        time.sleep(3)  # a few scrapes of a server at rest
        answers = load(server)
        counted = {o: n - before[o] for o, n in server.origins().items()}
        deadline = time.monotonic() + 60
        while _audits(server) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(3)
        yield prometheus, started, time.time(), answers, counted


def _audits(server) -> float:
    return server.metrics()['kvshare_audits_total{reason="none",result="done"}']


def test_three_sources_one_number(server, played):
    _, _, _, answers, counted = played
    told = {o: sum(a["kvshare"][o] for a in answers) for o in ORIGINS}
    pages = [requests.get(f"{server.url}/kvshare/requests/{a['id']}", timeout=30).json() for a in answers]
    runs = [run for page in pages for run in page["details"]["runs"]]
    explained = {o: sum(run["length"] for run in runs if run["origin"] == o) for o in ORIGINS}
    assert told == counted == explained and told["reused"] > 0
    assert sum(told.values()) == sum(a["prompt_tokens"] for a in answers)
    found = server.metrics()
    by_tenant = [f'kvshare_tenant_prompt_tokens_total{{origin="{o}",tenant="{t}"}}' for o in ORIGINS for t in TENANTS]
    assert sum(found[name] for name in by_tenant) == sum(told.values())


def test_every_series_arrives_and_every_panel_shows_something(played):
    prometheus, start, end, _, _ = played
    missing = {name for s in SERIES if not s.edge for name in s.samples} - prometheus.names()
    assert not missing
    for board in generate.boards():
        empty = render.draw(prometheus, board, LOGS.parent / "dashboards" / f"{board}.png", start, end, "5s")
        assert [title for title in empty if title not in WITH_FILE] == [], board


def test_a_healthy_run_raises_no_alert(played):
    alerts = played[0].ask("alerts")["alerts"]
    assert [a["labels"]["alertname"] for a in alerts if a["state"] == "firing"] == []


def test_a_request_explains_itself(server, played):
    answer = next(a for a in played[3] if a["kvshare"]["outcome"] == "reused")
    page = requests.get(f"{server.url}/kvshare/requests/{answer['id']}", headers=BROWSER, timeout=30)
    assert page.headers["content-type"].startswith("text/html") and 'class="reused"' in page.text
    record = requests.get(f"{server.url}/kvshare/requests/{answer['id']}", timeout=30).json()
    lenders = [d for run in record["details"]["runs"] for d in run.get("donors", ())]
    known = {a["id"] for a in played[3]}
    assert lenders and all(d["rid"] in known or d["rid"].startswith("kvshare-audit-") for d in lenders)
    assert record["report"] == answer["kvshare"] and "details" not in answer["kvshare"]
    assert requests.get(f"{server.url}/kvshare/requests/nobody", timeout=30).status_code == 404


def test_the_command_line_shows_the_same(server, played, capsys):
    answer = next(a for a in played[3] if a["kvshare"]["outcome"] == "reused")
    assert main(["explain", answer["id"], "--url", server.url]) == 0
    assert "r" * 20 in capsys.readouterr().out
    assert main(["top", "--once", "--url", server.url]) == 0
    out = capsys.readouterr().out
    assert all(tenant in out for tenant in TENANTS)


def test_the_live_page_in_a_browser(server, played):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: apt-get install --no-install-recommends chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command = [browser, *flags, "--dump-dom", f"{server.url}/kvshare/"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert all(f"<td>{tenant}</td>" in shown.stdout for tenant in TENANTS), shown.stderr[-500:]
