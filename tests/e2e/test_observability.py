"""A live server under a real Prometheus: three sources, one number; no panel is empty; requests explain themselves."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import generate
import pytest
import render
import requests
from harness import LOGS, SYSTEMS, chat, sections

from kvshare_sched.observe.series import ORIGINS, SERIES
from kvshare_sched.tools.cli import main

ENVIRONMENT = {"KVSHARE_AUDIT_SHARE": "0.3", "KVSHARE_REPAIR_ROWS": "2"}
DOCS = sections()
TENANTS = ("blue", "green", "red")
EACH = 8  # requests of a tenant
WITH_FILE = [p["title"] for p in generate.boards()["tenants"]["rows"]["With a tenants file"]]  # see test_tenants.py
BROWSER = {"accept": "text/html"}


def load(server) -> tuple[list[dict], int]:
    """(answers of three tenants that read the same texts in ever other orders, prompt tokens sent); one request in
    eight opts out."""
    picks = random.Random(1)
    asked = [
        (tenant, server.tokenize(chat(SYSTEMS[n % 3], picks.sample(DOCS[:6], 3), f"Question {n}?")), n % 8 != 7)
        for n in range(EACH)
        for tenant in TENANTS
    ]

    def ask(case) -> dict:
        tenant, prompt, reuse = case
        return server.post("/generate", server._body(prompt, 8, tenant, reuse)).json()["meta_info"]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, asked)), sum(len(prompt) for _, prompt, _ in asked)


@pytest.fixture(scope="module")
def played(server, local_prometheus, tmp_path_factory):
    """(Prometheus, start, end, answers, the origins counted meanwhile, prompt tokens sent)."""
    target = server.url.removeprefix("http://")
    before, started = server.origins(), time.time()
    with local_prometheus.scraping([target], tmp_path_factory.mktemp("prometheus")) as prometheus:
        time.sleep(3)  # a few scrapes of a server at rest
        answers, sent = load(server)
        counted = {o: n - before[o] for o, n in server.origins().items()}
        deadline = time.monotonic() + 60
        while _audits(server) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(3)
        yield prometheus, started, time.time(), answers, counted, sent


def _audits(server) -> float:
    return server.metrics()['kvshare_audits_total{reason="none",result="done"}']


def test_three_sources_one_number(server, played):
    _, _, _, answers, counted, sent = played
    told = {o: sum(a["kvshare"][o] for a in answers) for o in ORIGINS}
    pages = [requests.get(f"{server.url}/kvshare/requests/{a['id']}", timeout=30).json() for a in answers]
    runs = [run for page in pages for run in page["details"]["runs"]]
    explained = {o: sum(run["length"] for run in runs if run["origin"] == o) for o in ORIGINS}
    assert told == counted == explained and told["reused"] > 0
    assert sum(told.values()) == sum(a["prompt_tokens"] for a in answers) == sent
    found = server.metrics()
    by_tenant = [f'kvshare_tenant_prompt_tokens_total{{origin="{o}",tenant="{t}"}}' for o in ORIGINS for t in TENANTS]
    assert sum(found[name] for name in by_tenant) == sum(told.values())


def test_every_series_arrives_and_every_panel_shows_something(played):
    prometheus, start, end, *_ = played
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


def counted(server) -> tuple[float, float]:
    """(requests, prompt tokens) on /metrics so far."""
    found = server.metrics()
    return tuple(
        sum(v for k, v in found.items() if k.startswith(f"kvshare_{n}_total")) for n in ("requests", "prompt_tokens")
    )


def grown(server, before: tuple[float, float]) -> tuple[float, ...]:
    return tuple(now - then for now, then in zip(counted(server), before, strict=True))


def test_a_health_check_is_no_client(server):
    before = counted(server)
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert grown(server, before) == (0, 0)


def test_every_prompt_the_engine_takes_up_counts_once_samples_and_aborts_too(server):
    prompt = server.tokenize(chat(SYSTEMS[1], DOCS[6:9]))
    before = counted(server)
    body = server._body(prompt, 4, server.namespace(), True)
    body["sampling_params"] |= {"n": 2, "temperature": 1.0}
    reports = [answer["meta_info"]["kvshare"] for answer in server.post("/generate", body).json()]
    assert [sum(r[o] for o in ORIGINS) for r in reports] == [len(prompt)] * 2
    assert grown(server, before) == (3, 3 * len(prompt)), (
        "two samples, and SGLang's own pass that fills the cache first"
    )

    before = counted(server)
    body = server._body(prompt, 400, server.namespace(), True, stream=True)
    body["sampling_params"]["ignore_eos"] = True
    with server.post("/generate", body, stream=True) as answer:
        next(line for line in answer.iter_lines() if line.startswith(b"data: {"))  # and the client is gone
    server.assert_idle_and_clean()
    assert grown(server, before) == (1, len(prompt))
