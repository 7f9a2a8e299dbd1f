"""The pages: who may see what, bounded memory, HTML that needs nothing but itself; `kvshare top` on the same state."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dashboards"))

from engine import move  # noqa: E402

from kvshare_sched.engine.sglang.http import pages as http_pages  # noqa: E402
from kvshare_sched.engine.sglang.http import reports as http_reports  # noqa: E402
from kvshare_sched.observe import recent_requests, render, server_state  # noqa: E402
from kvshare_sched.observe.metrics import ShareMetrics  # noqa: E402
from kvshare_sched.observe.series import SERIES  # noqa: E402
from kvshare_sched.records.report import ShareReport  # noqa: E402
from kvshare_sched.records.request import Outcome, Reason  # noqa: E402
from kvshare_sched.tools import inspect  # noqa: E402
from kvshare_sched.tools.cli import main  # noqa: E402

REPORT = ShareReport(10, 60, 9, 30, Outcome.REUSED, Reason.NONE, 1, 0, "consensus", 900, 30, 800, 0.5, 0.4).to_json()
RUNS = [
    {"origin": "exact", "start": 0, "length": 10},
    {"origin": "reused", "start": 10, "length": 60, "donors": [{"rid": "<b>evil</b>", "start": 3, "foreign": 0.5}]},
    {"origin": "fresh", "start": 70, "length": 30},
]


def details(extra_key="blue", cache_salt="") -> dict:
    return {"extra_key": extra_key, "cache_salt": cache_salt, "ratio": 0.18, "runs": RUNS}


@pytest.fixture
def keys(monkeypatch):
    """What SGLang was started with; no keys unless a test sets them."""
    found = SimpleNamespace(api_key=None, admin_api_key=None)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: found)
    return found


@pytest.fixture
def samples():
    registry = CollectorRegistry()
    metrics = ShareMetrics(registry=registry)
    for n in (1, 2, 3):
        move(metrics, n)
    return server_state.samples_of(registry.collect())


@pytest.fixture
def client(keys, samples, monkeypatch):
    monkeypatch.setattr(recent_requests, "requests", recent_requests.Recent())
    monkeypatch.setattr(http_pages, "_own_samples", lambda: samples)
    recent_requests.requests.remember("r1", REPORT, details())
    recent_requests.requests.remember("r2", REPORT, details("green", "pepper"))
    return TestClient(Starlette(routes=http_pages.routes()))


BROWSER = {"accept": "text/html,application/xhtml+xml"}


class Page(HTMLParser):
    """Fails on tags that do not close in order; collects what a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k == "src" or (k == "href" and tag != "a")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_request_as_html_needs_nothing_else_and_runs_nothing(client):
    text = client.get("/kvshare/requests/r1", headers=BROWSER).text
    page = Page(text)
    assert page.fetched == [] and not {"script", "b", "link", "img"} & set(page.tags)
    assert text.count('<span class="reused" style="flex:60"') == 1
    assert "&lt;b&gt;evil&lt;/b&gt;" in text and Reason.NONE.sentence in text


def test_an_id_with_a_slash_is_found_too(client):
    recent_requests.requests.remember("a/../b", REPORT, details())
    assert client.get("/kvshare/requests/a%2F..%2Fb").json()["rid"] == "a/../b"


def test_a_request_as_json(client):
    assert client.get("/kvshare/requests/r1").json() == {"rid": "r1", "report": REPORT, "details": details()}


def test_a_tenant_sees_its_own_and_learns_nothing_of_others(client, keys):
    keys.admin_api_key = "secret"
    own, salted = {http_pages.EXTRA_KEY: "blue"}, {http_pages.EXTRA_KEY: "green", http_pages.CACHE_SALT: "pepper"}
    assert client.get("/kvshare/requests/r1", headers=own).status_code == 200
    assert client.get("/kvshare/requests/r2", headers=salted).status_code == 200
    assert client.get("/kvshare/requests/r2", headers={"authorization": "Bearer secret"}).status_code == 200
    refused = [
        client.get("/kvshare/requests/r1"),
        client.get("/kvshare/requests/r2", headers=own),
        client.get("/kvshare/requests/r2", headers={http_pages.EXTRA_KEY: "green"}),
        client.get("/kvshare/requests/r1", headers={"authorization": "Bearer guess"}),
        client.get("/kvshare/requests/never", headers=own),
    ]
    assert {(r.status_code, r.text) for r in refused} == {(404, refused[-1].text)}


def test_the_live_page_is_for_admins(client, keys):
    assert client.get("/kvshare/").status_code == 200
    keys.admin_api_key = "secret"
    assert client.get("/kvshare/", headers={http_pages.EXTRA_KEY: "blue"}).status_code == 401
    assert client.get("/kvshare/", headers={"authorization": "Bearer secret"}).status_code == 200


def test_behind_sglangs_own_keys(keys, samples, monkeypatch, client):
    """Its middleware lets the admin's key in where we say so, and a client's key to the tenant's own requests."""
    from sglang.srt.utils.auth import add_api_key_middleware

    keys.api_key, keys.admin_api_key = "client", "secret"
    app = Starlette(routes=http_pages.routes())
    add_api_key_middleware(app, api_key="client", admin_api_key="secret")
    behind = TestClient(app)
    admin, tenant = {"authorization": "Bearer secret"}, {"authorization": "Bearer client", http_pages.EXTRA_KEY: "blue"}
    assert behind.get("/kvshare/", headers=admin).status_code == 200
    assert behind.get("/kvshare/?rid=r1", headers=admin).json()["rid"] == "r1"
    assert behind.get("/kvshare/?rid=never", headers=admin).status_code == 404
    assert behind.get("/kvshare/", headers=tenant).status_code == 401
    assert behind.get("/kvshare/requests/r1", headers=tenant).json()["rid"] == "r1"
    assert behind.get("/kvshare/requests/r2", headers=tenant).status_code == 404
    assert behind.get("/kvshare/requests/r1", headers={http_pages.EXTRA_KEY: "blue"}).status_code == 401


@pytest.fixture
def server(client, monkeypatch):
    """The command line, talking to the pages without a socket."""
    monkeypatch.setattr(
        inspect, "_get", lambda url, headers: client.get(url.removeprefix("http://here"), headers=headers)
    )
    return "http://here"


def test_explain_on_the_command_line(server, capsys, tmp_path):
    assert main(["explain", "r1", "--url", server]) == 0
    out = capsys.readouterr().out
    assert "e" * 10 + "r" * 60 + "f" * 30 in out and "reused  10    70   60" in out
    assert main(["explain", "r1", "--url", server, "--html", str(tmp_path / "r1.html")]) == 0
    Page((tmp_path / "r1.html").read_text())
    assert main(["explain", "../r2", "--url", server]) == 1
    assert "404" in capsys.readouterr().err


def test_explain_with_an_admins_key_goes_where_it_counts(server, keys, capsys):
    keys.admin_api_key = "secret"
    assert main(["explain", "r2", "--url", server, "--key", "secret"]) == 0
    assert main(["explain", "r2", "--url", server, "--extra-key", "green", "--cache-salt", "pepper"]) == 0
    assert main(["explain", "r2", "--url", server, "--extra-key", "green"]) == 1


def test_top_on_the_command_line(monkeypatch, capsys):
    registry = CollectorRegistry()
    move(ShareMetrics(registry=registry), 1)
    answer = SimpleNamespace(status_code=200, text=generate_latest(registry).decode())
    sent = []
    monkeypatch.setattr(inspect, "_get", lambda url, headers: sent.append(headers) or answer)
    assert main(["top", "--once", "--key", ""]) == main(["top", "--once", "--key", "root"]) == 0
    assert sent == [{}, {"authorization": "Bearer root"}]
    out = capsys.readouterr().out
    assert "tokens, reused" in out and "blue" in out and "no_match" in out
    answer.text = "other_series 1\n"
    assert main(["top", "--once"]) == 1
    assert "--enable-metrics" in capsys.readouterr().err


def test_the_live_page_shows_every_subject_and_the_latest_requests(client):
    text = client.get("/kvshare/", headers=BROWSER).text
    page = Page(text)
    assert page.fetched == [] and 'href="?rid=r2"' in text
    for title in ("Reuse", "Queue", "Index and pool", "Quality", "Tenants", "Why requests were ordinary"):
        assert f"<h2>{title}</h2>" in text
    for cell in ("<td>blue</td>", "<td>(default)</td>", "no_match", "0.0300 nats"):
        assert cell in text
    assert client.get("/kvshare/").json()["latest"] == ["r2", "r1"]


def test_every_name_the_live_state_asks_for_is_a_series(samples, monkeypatch):
    asked = set()
    true = server_state._sum
    monkeypatch.setattr(
        server_state, "_sum", lambda samples, name, labels: asked.add(name) or true(samples, name, labels)
    )
    server_state.sections(server_state.State(samples))
    assert len(asked) > 25 and asked <= {name for s in SERIES for name in s.samples}


def test_numbers_since_an_earlier_look(samples):
    registry = CollectorRegistry()
    metrics = ShareMetrics(registry=registry)
    for n in (1, 2, 3, 4):
        move(metrics, n)
    later = server_state.samples_of(registry.collect())
    whole, since = server_state.State(later), server_state.State(later, samples)
    assert whole.grown("prompt_tokens") == 4 * since.grown("prompt_tokens") > 0
    assert whole.now("index_tokens") == since.now("index_tokens") == 4000


def test_memory_is_bounded_and_a_busy_tenant_pushes_out_only_its_own():
    kept = recent_requests.Recent(each=3, tenants=2)
    kept.remember("quiet", REPORT, details("quiet"))
    for n in range(10):
        kept.remember(f"busy{n}", REPORT, details("busy"))
    assert kept.find("quiet") and kept.find("busy9") and not kept.find("busy6")
    assert [r["rid"] for r in kept.latest(9)] == ["busy9", "busy8", "busy7", "quiet"]
    kept.remember("new", REPORT, details("new"))
    assert not kept.find("quiet"), "the tenant that has been silent longest leaves"


def test_prompts_of_very_many_runs_are_kept_for_a_shorter_time(monkeypatch):
    monkeypatch.setattr(recent_requests, "RUNS", 10)
    kept = recent_requests.Recent()
    for n in range(10):
        kept.remember(f"r{n}", REPORT, details())  # three runs each
    assert [r["rid"] for r in kept.latest(9)] == ["r9", "r8", "r7"]
    kept.remember("many", REPORT, details() | {"runs": RUNS * 100})
    assert [r["rid"] for r in kept.latest(9)] == ["many"], "the newest is always there"


def test_two_tenants_that_choose_one_id_both_see_their_own(client, keys):
    keys.admin_api_key = "secret"
    recent_requests.requests.remember("r1", REPORT, details("green"))
    for tenant in ("blue", "green"):
        found = client.get("/kvshare/requests/r1", headers={http_pages.EXTRA_KEY: tenant})
        assert found.json()["details"]["extra_key"] == tenant
    assert client.get("/kvshare/requests/r1", headers={http_pages.EXTRA_KEY: "red"}).status_code == 404
    operator = client.get("/kvshare/requests/r1", headers={"authorization": "Bearer secret"})
    assert operator.json()["details"]["extra_key"] == "green", "the one who came last"


def test_an_id_that_is_no_text_breaks_no_page(client):
    recent_requests.requests.remember("half \ud800", REPORT, details())
    assert "half ?" in client.get("/kvshare/", headers=BROWSER).text
    assert client.get("/kvshare/").json()["latest"][0] == "half \ud800"


def test_pages_load_nothing_and_are_not_kept(client):
    for path in ("/kvshare/", "/kvshare/requests/r1", "/kvshare/requests/never"):
        for headers in ({}, BROWSER):
            found = client.get(path, headers=headers).headers
            assert found["content-security-policy"].startswith("default-src 'none'")
            assert found["cache-control"] == "no-store"


def test_names_do_not_speak_to_the_terminal():
    assert render.text_tables([("T", ("a",), [("\033[2J\nred",)])]) == "T\n  a\n  ?[2J?red"


def test_running_requests_of_all_engines_but_not_of_all_ranks():
    labels = [{"dp_rank": d, "tp_rank": t} for d in "01" for t in "012"]
    state = server_state.State({"sglang:num_running_reqs": [(has, 4.0) for has in labels]})
    assert state.sglang("num_running_reqs") == [4.0, 4.0] and state.sglang("token_usage") == []


def test_a_server_that_was_started_anew_counts_from_nothing(samples):
    before = {name: [(labels, 10 * value) for labels, value in rows] for name, rows in samples.items()}
    again, whole = server_state.State(samples, before), server_state.State(samples)
    assert again.grown("prompt_tokens") == whole.grown("prompt_tokens") > 0


def test_details_are_kept_for_the_page_and_never_reach_the_client(monkeypatch):
    monkeypatch.setattr(recent_requests, "requests", recent_requests.Recent())
    meta, state, passed = {"id": "r9"}, SimpleNamespace(), []
    info = {"kvshare": [[REPORT | {"details": details()}]], "other": [[1]]}
    http_reports.update_request_meta_info(lambda *a: passed.append(a), None, meta, state, info, 0, None)
    assert meta["kvshare"] == REPORT and recent_requests.requests.find("r9")[0]["details"] == details()
    assert passed[0][3] == {"other": [[1]]}


def test_the_bar_in_a_terminal_is_the_prompt_in_proportion():
    bar = render.text_bar(RUNS, colour=False)
    assert bar == "e" * 10 + "r" * 60 + "f" * 30
    assert render.text_bar(RUNS[:1], colour=False) == "e" * 10 and render.text_bar([], colour=True) == "\033[0m"
    assert "\033[43mr" in render.text_bar(RUNS, colour=True)


def test_tables_in_a_terminal_line_up():
    text = render.text_tables([("Title", ("a", "bb"), [("x", 1), ("long", 22)]), ("Empty", ("a",), [])])
    assert text == "Title\n  a     bb\n  x     1\n  long  22"


def test_pages_are_added_only_where_our_backend_serves(monkeypatch):
    monkeypatch.setattr("sglang.srt.arg_groups.model_override_base.resolved_view", lambda args: args)
    for backend, count in (("kvshare", 2), (None, 0)):
        app = Starlette()
        app.server_args = SimpleNamespace(radix_cache_backend=backend)
        assert (
            http_pages.add_prometheus_middleware(lambda app: "done", app) == "done" and len(app.router.routes) == count
        )
    assert http_pages.add_prometheus_middleware(lambda app: "done", Starlette()) == "done"
