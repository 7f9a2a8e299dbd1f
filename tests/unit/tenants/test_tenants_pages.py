"""The pages behind the door of a tenants file: operators see all, a tenant its own, and nobody learns of others."""

from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from test_render import REPORT, details

from kvshare_sched.engine.sglang.http import pages as http_pages
from kvshare_sched.observe import recent_requests
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tenants.middleware import Edge, Middleware
from kvshare_sched.tenants.namespaces import name_of, within
from kvshare_sched.tenants.reload import TenantsFile
from kvshare_sched.tools import inspect
from kvshare_sched.tools.cli import main

FILE = f"""
unknown = "anonymous"
[operators]
keys = ["{hash_of("root")}"]
[tenants.acme]
keys = ["{hash_of("acme-key")}"]
requests = 1
[tenants.globex]
keys = ["{hash_of("globex-key")}"]
"""
ROOT, ACME, GLOBEX = ({"authorization": f"Bearer {key}"} for key in ("root", "acme-key", "globex-key"))


def space(name: str) -> str:
    return name_of("mark", "tenant", name)


@pytest.fixture
def edge(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    return Edge(TenantsFile(str(path), 10_000, 10_000), lambda: "mark")


@pytest.fixture
def client(edge, monkeypatch):
    monkeypatch.setattr(
        "sglang.srt.runtime_context.get_serving", lambda: SimpleNamespace(api_key=None, admin_api_key=None)
    )
    monkeypatch.setattr(recent_requests, "requests", recent_requests.Recent())
    monkeypatch.setattr(http_pages, "_own_samples", dict)
    recent_requests.requests.remember("a1", REPORT, details(space("acme")))
    recent_requests.requests.remember("a2", REPORT, details(space("acme"), within(None, "pepper")))
    recent_requests.requests.remember("g1", REPORT, details(space("globex")))
    recent_requests.requests.remember("n1", REPORT, details(space("anonymous")))
    admin = PlainTextResponse("documents")
    return TestClient(Middleware(Starlette(routes=http_pages.routes()), edge, admin))


def test_operators_see_everything_and_reach_the_library_too(client):
    assert client.get("/kvshare/", headers=ROOT).json()["latest"] == ["n1", "g1", "a2", "a1"]
    assert client.get("/kvshare/?rid=g1", headers=ROOT).json()["rid"] == "g1"
    assert client.get("/kvshare/requests/n1", headers=ROOT).json()["rid"] == "n1"
    assert client.get("/kvshare/documents", headers=ROOT).text == "documents"


def test_a_tenant_sees_its_own_whatever_salt_they_had(client, edge):
    assert [client.get(f"/kvshare/requests/{rid}", headers=ACME).status_code for rid in ("a1", "a2", "g1")] == [
        200,
        200,
        404,
    ]
    assert client.get("/kvshare/requests/g1", headers=GLOBEX).status_code == 200
    edge.flights.start(edge.tenants().tenants["acme"], 1)
    assert client.get("/kvshare/requests/a1", headers=ACME).status_code == 200, "a look is no request in flight"


def test_foreign_and_unknown_requests_answer_alike(client):
    forged = {http_pages.EXTRA_KEY: space("acme"), http_pages.CACHE_SALT: ""}
    refused = [
        client.get("/kvshare/requests/never", headers=ACME),
        client.get("/kvshare/requests/a1", headers=GLOBEX),
        client.get("/kvshare/requests/a1", headers=GLOBEX | forged),
        client.get("/kvshare/requests/a1", headers=forged),
        client.get("/kvshare/requests/n1"),  # whoever is unknown shares that name with strangers
        client.get("/kvshare/requests/n1", headers=ACME),
    ]
    assert {(r.status_code, r.text) for r in refused} == {(404, refused[0].text)}


@pytest.mark.parametrize("path", ["/kvshare/", "/kvshare/?rid=a1", "/kvshare/documents", "/kvshare/requests"])
def test_everything_else_is_for_operators(client, path):
    for headers in (ACME, {}):
        answer = client.get(path, headers=headers, follow_redirects=False)
        assert answer.status_code == 403 and "operators" in answer.text


def test_without_a_known_key_nothing_is_told_where_the_file_says_so(client, edge):
    edge._file.current = parse(FILE.replace("anonymous", "reject"), "f")
    assert client.get("/kvshare/requests/a1").status_code == client.get("/kvshare/").status_code == 401


def test_a_page_names_the_tenant_and_not_its_namespace(client):
    text = client.get("/kvshare/requests/a1", headers=ACME | {"accept": "text/html"}).text
    assert "<td>acme</td>" in text and space("acme") not in text


def test_explain_takes_a_tenants_key_as_well_as_an_operators(client, monkeypatch, capsys):
    monkeypatch.setattr(
        inspect, "_get", lambda url, headers: client.get(url.removeprefix("http://here"), headers=headers)
    )

    def explain(rid: str, key: str) -> int:
        return main(["explain", rid, "--url", "http://here", "--key", key])

    assert [explain("a1", "root"), explain("a1", "acme-key"), explain("a1", "globex-key")] == [0, 0, 1]
    assert "acme" in capsys.readouterr().out
