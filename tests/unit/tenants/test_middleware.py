"""The HTTP edge without SGLang: who is let in where, what a body becomes, what is counted in flight."""

import asyncio
import json
import os
import time
from types import SimpleNamespace

import pytest

from kvshare_sched.engine.sglang.http import identity as http_identity
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import SERVER, Caller, hash_of, identify
from kvshare_sched.tenants.middleware import Edge, Middleware, caller_here
from kvshare_sched.tenants.namespaces import name_of, owner_of
from kvshare_sched.tenants.policy import read, stamp_of
from kvshare_sched.tenants.quotas import Flights, OverQuota
from kvshare_sched.tenants.reload import TenantsFile
from kvshare_sched.tenants.stamp_request import requests_in, stamp_request

FILE = f"""
unknown = "anonymous"
[operators]
keys = ["{hash_of("root")}"]
open = ["/metrics"]
[groups.handbook]
[tenants.acme]
keys = ["{hash_of("acme-key")}"]
groups = ["handbook"]
weight = 3
priority = 5
requests = 2
tokens = 100
[tenants.globex]
keys = ["{hash_of("globex-key")}"]
"""
KEY = (b"authorization", b"Bearer acme-key")
ROOT = (b"authorization", b"Bearer root")


def body(**values):
    """The plain attributes of a `GenerateReqInput`."""
    empty = dict.fromkeys(
        (
            "extra_key",
            "cache_salt",
            "priority",
            "sampling_params",
            "session_params",
            "text",
            "input_ids",
            "input_embeds",
        )
    )
    return SimpleNamespace(**empty | {"stream": False} | values)


@pytest.fixture
def desk(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    made = Edge(TenantsFile(str(path), 10_000, 10_000, clock=lambda: time.time() + 60), lambda: "mark")
    made.path = path
    return made


def ask(desk, path, *headers, kind="http", client="10.0.0.9", admin=None, method="POST"):
    """(status or websocket code, tenant the application saw)."""
    sent, seen = [], []

    async def app(scope, receive, send):
        seen.append(caller_here.get())

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": list(headers), "client": (client, 1), "method": method}
    asyncio.run(Middleware(app, desk, admin)(scope, None, send))
    assert caller_here.get() is None
    if seen:
        return 200, seen[0].tenant.name if seen[0] else None
    return sent[0].get("status", sent[0].get("code")), None


def test_tenants_reach_what_serves_and_operators_the_rest(desk):
    for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"):
        assert ask(desk, path, KEY) == (200, "acme")
        assert ask(desk, path) == (200, "anonymous")
    for path in (
        "/flush_cache",
        "/abort_request",
        "/open_session",
        "/server_info",
        "/v1/loads",
        "/docs",
        "/generate/",
        "//generate",
        "/GENERATE",
        "/v1/responses/resp_1",
        "/kvshare/documents",
        "/update_weights_from_disk",
    ):
        assert ask(desk, path, KEY) == (403, None)
        assert ask(desk, path, ROOT) == (200, "(operators)")
    desk._file.current = parse(FILE.replace('"/metrics"', '"/metrics", "/generate"'), "f")
    assert ask(desk, "/generate", KEY) == (200, "acme"), "what generates needs an identity, open or not"
    assert ask(desk, "/health") == ask(desk, "/metrics") == (200, "(server)")
    assert ask(desk, "/generate", method="OPTIONS") == (200, "(server)")
    for path in ("/metrics/", "/metrics/x", "/flush_cache", "/nothing"):
        assert ask(desk, path, method="OPTIONS") == (403, None), "mounts answer any method"
    assert ask(desk, "/v1/realtime", KEY, kind="websocket") == (1008, None)
    assert ask(desk, "/health", kind="websocket") == (1008, None)


def test_nobody_is_refused_where_the_file_says_so(desk):
    desk.path.write_text(FILE.replace("anonymous", "reject"))
    os.utime(desk.path, (1, 1))
    desk._looked = float("-inf")
    assert ask(desk, "/generate") == (401, None)
    assert ask(desk, "/generate", KEY) == (200, "acme")
    assert ask(desk, "/health") == (200, "(server)")


def test_only_a_starting_servers_loopback_needs_no_key(desk):
    desk.path.write_text(FILE.replace("anonymous", "reject"))
    os.utime(desk.path, (1, 1))
    desk._looked, desk.starting = float("-inf"), lambda: True
    assert ask(desk, "/generate", client="127.0.0.1") == (200, "(server)")
    assert ask(desk, "/generate") == (401, None)
    assert ask(desk, "/flush_cache", client="127.0.0.1") == (401, None)
    desk.starting = lambda: False
    assert ask(desk, "/generate", client="127.0.0.1") == (401, None)
    assert ask(desk, "/freeze_gc", client="127.0.0.1") == (200, "(server)"), "the last request of a start"
    assert ask(desk, "/freeze_gc", client="127.0.0.1") == (401, None)


def test_a_server_on_one_address_starts_from_there(desk):
    desk._file.current = parse('unknown = "reject"', "f")
    made = Edge(desk._file, lambda: "mark", starting=lambda: True, own=http_identity._addresses("10.0.0.5"))
    assert ask(made, "/generate", client="10.0.0.5") == (200, "(server)")
    assert ask(made, "/generate", client="10.0.0.6") == (401, None)
    assert http_identity._addresses(None) == set() and "127.0.0.1" in http_identity._addresses("localhost")


def test_a_failure_of_ours_lets_nobody_in(desk, caplog):
    desk.tenants = lambda: 1 / 0
    assert ask(desk, "/flush_cache") == (400, None)


def test_the_admin_application_is_for_operators(desk):
    async def admin(scope, receive, send):
        await send({"type": "http.response.start", "status": 299, "headers": []})

    assert ask(desk, "/kvshare/documents", ROOT, admin=admin) == (299, None)
    assert ask(desk, "/kvshare/documents", KEY, admin=admin) == (403, None)


def test_a_refusal_at_the_door_is_counted(tmp_path):
    path, told = tmp_path / "tenants.toml", []
    path.write_text(FILE)
    desk = Edge(TenantsFile(str(path), 10_000, 10_000), lambda: "mark", refused=lambda *refused: told.append(refused))
    desk.flights.start(desk.tenants().tenants["acme"], 2)
    assert ask(desk, "/generate", KEY) == (429, None) and told == [("acme", "requests")]
    assert ask(desk, "/kvshare/requests/r", KEY) == (200, "acme") and len(told) == 1


# ---- bodies ----


def stamped(tenants=None, name="acme", **values):
    tenants = tenants or parse(FILE, "f")
    obj = body(**values)
    stamp_request(obj, Caller(tenants.tenants[name]), tenants, "mark", 7)
    return obj


OWN = name_of("mark", "tenant", "acme")


@pytest.mark.parametrize("key", [None, "", "globex", name_of("mark", "tenant", "globex"), "é" * 10_000])
@pytest.mark.parametrize("salt", [None, "", "s", name_of("mark", "documents", "handbook")])
def test_whatever_a_body_says_it_stays_inside_its_tenant(key, salt):
    obj = stamped(extra_key=key, cache_salt=salt)
    assert obj.extra_key == OWN and owner_of(obj.extra_key) == "acme"
    assert (obj.cache_salt is None) == (not key and not salt)


def test_salts_of_one_tenant_divide_it_without_collisions():
    pairs = [("a", "bc"), ("ab", "c"), ("abc", None), (None, "abc"), (None, None)]
    assert len({stamped(extra_key=k, cache_salt=s).cache_salt for k, s in pairs}) == len(pairs)


@pytest.mark.parametrize("params", [{"beam_width": 8}, [{}, {"beam_width": 2}], {"beam_width": "2"}])
def test_beams_would_run_uncounted_and_are_refused(params):
    with pytest.raises(ValueError, match="beam_width"):
        stamped(text="x", sampling_params=params)
    for width in (None, 1):
        stamped(text="x", sampling_params={"beam_width": width})


@pytest.mark.parametrize("asked", [float("nan"), 1.5, "9", [9], True])
def test_a_priority_that_is_no_number_is_refused(asked):
    with pytest.raises(ValueError, match="priority"):
        stamped(text="x", priority=asked)
    assert stamped(text="x", priority=3).priority == 3


def test_strangers_share_with_nobody_not_even_with_themselves():
    tenants = parse(FILE, "f")

    def salts(name, **values):
        obj = body(**values)
        stamp_request(obj, Caller(tenants.tenants.get(name, tenants.anonymous)), tenants, "mark", 7)
        return obj.cache_salt if isinstance(obj.cache_salt, list) else [obj.cache_salt]

    bodies = [{"text": "x"}, {"text": "x"}, {"cache_salt": "s"}, {"cache_salt": "s"}, {"extra_key": ["a", "a"]}]
    found = [salt for values in bodies for salt in salts("nobody", **values)]
    assert len(set(found)) == 6 and None not in found
    assert salts("acme", cache_salt="s") == salts("acme", cache_salt="s"), (
        "the control: a tenant does share with itself"
    )
    server = [body(text="x"), body(text="x")]
    for obj in server:
        stamp_request(obj, Caller(SERVER), tenants, "mark", 7)
    assert server[0].cache_salt != server[1].cache_salt, (
        "whoever comes by a path of `operators.open` may be anybody, too"
    )
    assert stamp_of(tenants.anonymous, tenants, "mark", 0).donor_tokens == 0, "so nothing of them is worth keeping"


def test_a_batch_in_one_body_is_stamped_throughout():
    obj = stamped(text=["x", "y"], extra_key=["a", ""], cache_salt="s", sampling_params=[{"n": 1}, {}])
    assert obj.extra_key == [OWN, OWN] and len(set(obj.cache_salt)) == 2
    assert all(read(p["custom_params"]).tenant == "acme" for p in obj.sampling_params)
    obj = stamped(text=["x", "y"], sampling_params={"temperature": 0})
    assert obj.extra_key == OWN and read(obj.sampling_params["custom_params"]).tenant == "acme"


def test_a_stamp_in_the_body_counts_for_nothing_and_wishes_stay():
    forged = {"kvshare_tenant": "forged", "kvshare": {"ratio": 0.5}}
    custom = stamped(sampling_params={"custom_params": forged}).sampling_params["custom_params"]
    stamp = read(custom)
    assert stamp.tenant == "acme" and stamp.weight == 3 and stamp.flight == 7 and custom["kvshare"] == {"ratio": 0.5}
    assert [(one.extra_key, one.rule) for one in stamp.lenders] == [
        (name_of("mark", "documents", "handbook"), "document")
    ]
    assert forged["kvshare_tenant"] == "forged", "the body's own object is left alone"


def test_ids_are_the_servers(desk):
    assert stamped(rid="kvshare-audit-1").rid is None
    engine, _ = drive(desk, body(text="x", rid="chosen"))
    assert engine[0].rid is None
    obj = body(text="x", rid="HEALTH_CHECK_1")
    stamp_request(obj, Caller(SERVER), desk.tenants(), "mark", 0)
    assert obj.rid == "HEALTH_CHECK_1", "the server's own keep theirs"


@pytest.mark.parametrize(
    "values",
    [
        {"session_params": {"id": "s"}},
        {"extra_key": 3},
        {"extra_key": ["a"], "cache_salt": ["b", "c"]},
        {"extra_key": ["a", 3]},
        {"sampling_params": {"custom_params": "x"}},
        {"sampling_params": [3]},
    ],
)
def test_what_cannot_be_stamped_is_refused_as_the_clients_fault(values):
    with pytest.raises(ValueError):
        stamped(**values)


def test_a_session_named_beside_the_parameters_is_dropped():
    assert stamped(session_id="another's").session_id is None


def test_priorities_end_at_the_ceiling():
    def priority(asked, sign=1, name="acme"):
        tenants, obj = parse(FILE, "f"), body(priority=asked)
        stamp_request(obj, Caller(tenants.tenants[name]), tenants, "mark", 0, sign=sign)
        return obj.priority

    assert [priority(p) for p in (None, 3, 5, 99)] == [0, 3, 5, 5]
    assert [priority(p, sign=-1) for p in (None, 3, 5, 99)] == [5, 5, 5, 99]
    assert [priority(p, name="globex") for p in (None, 99, -3)] == [0, 0, -3], "nobody is urgent by default"
    assert [priority(p, sign=0) for p in (None, 99)] == [None, 99], "SGLang may refuse a priority it does not use"


def test_requests_in_a_body():
    assert requests_in(body(text="x")) == 1
    assert requests_in(body(text=["x", "y"], sampling_params={"n": 3})) == 6
    assert requests_in(body(input_ids=[1, 2, 3])) == 1
    assert requests_in(body(input_ids=[[1], [2]], sampling_params=[{"n": 2}, {"n": 2}])) == 4
    assert requests_in(body(text=[], sampling_params={"n": "x"})) == 1


# ---- in flight ----


def test_flights_are_counted_refused_and_given_back():
    acme = parse(FILE, "f").tenants["acme"]
    told = []
    flights = Flights(lambda *refused: told.append(refused))
    first = flights.start(acme, 1)
    flights.grow(first, 60)
    second = flights.start(acme, 1)
    assert flights.full(acme)
    with pytest.raises(OverQuota, match="3 in flight; accepted: 2"):
        flights.start(acme, 1)
    with pytest.raises(OverQuota, match="110 in flight"):
        flights.grow(second, 50)
    assert told == [("acme", "requests"), ("acme", "tokens")]
    flights.end(first)
    flights.end(first)
    flights.grow(second, 100)
    flights.end(second)
    assert not flights.requests and not flights.tokens


def drive(desk, obj, headers=(KEY,), tokens=10, answers=2, fail=None, stop_after=None):
    """Send a body through middleware and hook, as an endpoint does; returns what the engine saw and what came back."""
    engine, came = [], []

    async def original(manager, obj, request):
        engine.append(obj)
        params = SimpleNamespace(**{"max_new_tokens": 4, **{k: v for k, v in obj.sampling_params.items()}})
        sent = SimpleNamespace(sampling_params=params, input_ids=[1] * tokens, input_embeds=None)

        async def send(manager, tokenized):
            return None

        await http_identity.send_one(send, SimpleNamespace(context_len=200), sent)
        came.append(dict(desk.flights.tokens))
        for n in range(answers):
            if fail is not None:
                raise fail
            yield n

    async def app(scope, receive, send):
        async for answer in http_identity.generate_request(original, None, obj):
            came.append(answer)
            if stop_after is not None:
                break

    http_identity._edge = desk
    try:
        scope = {"type": "http", "path": "/generate", "headers": list(headers), "client": None}
        asyncio.run(Middleware(app, desk)(scope, None, None))
    finally:
        http_identity._edge = None
    return engine, came


def test_a_request_runs_as_its_caller_and_leaves_no_count(desk):
    engine, came = drive(desk, body(text="x", extra_key="globex"))
    assert owner_of(engine[0].extra_key) == "acme" and came == [{"acme": 14}, 0, 1]
    assert not desk.flights.requests and not desk.flights.tokens


def test_counts_are_given_back_after_an_error_and_a_disconnect(desk):
    with pytest.raises(RuntimeError):
        drive(desk, body(text="x"), fail=RuntimeError("engine"))
    with pytest.raises(OverQuota):
        drive(desk, body(text="x"), tokens=97)
    with pytest.raises(OverQuota):
        drive(desk, body(text=["x"] * 3))
    drive(desk, body(text="x"), stop_after=1)
    assert not desk.flights.requests and not desk.flights.tokens


def test_a_handler_that_takes_one_answer_and_no_more_gives_the_count_back(desk):
    async def original(manager, obj, request):
        yield "answer"

    async def once():
        answers = http_identity.generate_request(original, None, body(text="x"))
        caller_here.set(identify([KEY], desk.tenants()))
        assert await anext(answers) == "answer" and not desk.flights.requests
        answers = http_identity.generate_request(original, None, body(text="x", stream=True))
        assert await anext(answers) == "answer" and desk.flights.requests == {"acme": 1}
        await answers.aclose()

    http_identity._edge = desk
    try:
        asyncio.run(once())
    finally:
        http_identity._edge = None
    assert not desk.flights.requests


def test_an_answer_without_a_limit_counts_as_what_the_context_leaves(desk):
    for asked in (None, 10**9):
        desk._file.current = parse(FILE.replace("tokens = 100", "tokens = 200"), "f")
        assert drive(desk, body(text="x", sampling_params={"max_new_tokens": asked}))[1][0] == {"acme": 200}
        desk._file.current = parse(FILE.replace("tokens = 100", "tokens = 199"), "f")
        with pytest.raises(OverQuota):
            drive(desk, body(text="x", sampling_params={"max_new_tokens": asked}))


def test_a_body_that_comes_late_has_the_rights_of_now(desk):
    """The headers were read under an older file."""

    async def original(manager, obj, request):
        yield read(obj.sampling_params["custom_params"])

    async def once(caller):
        caller_here.set(caller)
        return [answer async for answer in http_identity.generate_request(original, None, body(text="x"))]

    before, stranger = identify([KEY], desk.tenants()), identify([], desk.tenants())
    desk._file.current = parse(FILE.replace('groups = ["handbook"]', ""), "f")
    http_identity._edge = desk
    try:
        assert asyncio.run(once(before))[0].lenders == ()
        desk._file.current = parse(FILE.replace(hash_of("acme-key"), hash_of("another")), "f")
        with pytest.raises(ValueError, match="API key"):
            asyncio.run(once(before))  # the tenant is still there, its key was taken back
        desk._file.current = parse('unknown = "reject"', "f")
        for caller in (before, stranger):
            with pytest.raises(ValueError, match="API key"):
                asyncio.run(once(caller))
        assert asyncio.run(once(Caller(SERVER)))[0].tenant == "(server)", "the control: nothing to renew"
    finally:
        http_identity._edge = None


def test_a_full_tenant_is_told_at_the_door(desk):
    acme = desk.tenants().tenants["acme"]
    desk.flights.start(acme, 2)
    assert ask(desk, "/generate", KEY) == (429, None)
    assert ask(desk, "/generate", (b"x-api-key", b"globex-key")) == (200, "globex")


def test_without_a_caller_the_default_applies(desk):
    """A request that no HTTP call sent: the anonymous tenant, or nobody."""

    async def original(manager, obj, request):
        yield obj.extra_key

    async def collect():
        return [answer async for answer in http_identity.generate_request(original, None, body(text="x"))]

    http_identity._edge = desk
    try:
        assert owner_of(asyncio.run(collect())[0]) == "anonymous"
        desk.tenants = lambda: parse('unknown = "reject"', "f")
        with pytest.raises(ValueError, match="API key"):
            asyncio.run(collect())
    finally:
        http_identity._edge = None


def test_without_a_tenants_file_nothing_is_touched():
    async def original(manager, obj, request):
        yield obj.extra_key, obj.sampling_params

    async def collect():
        obj = body(text="x", extra_key="mine", sampling_params={"a": 1})
        return [answer async for answer in http_identity.generate_request(original, None, obj)]

    assert asyncio.run(collect()) == [("mine", {"a": 1})]


def test_a_refusal_is_json_and_names_nobody(desk):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/flush_cache", "headers": [KEY], "client": None}
    asyncio.run(Middleware(None, desk)(scope, None, send))
    assert json.loads(sent[1]["body"])["error"]["code"] == 403
    assert b"globex" not in sent[1]["body"] and b"acme" not in sent[1]["body"]
