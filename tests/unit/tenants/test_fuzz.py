"""What nobody meant to send: the tenants file one change away from a good one, headers and administrators' requests of
any kind at the door. A clean refusal each time, no crash, and nothing is different afterwards."""

import asyncio
import copy
import json
import os
import time
import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st
from test_file import GOOD
from test_library import FILE, World

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants import file
from kvshare_sched.tenants.admin import Admin
from kvshare_sched.tenants.file import Tenants, parse
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tenants.middleware import DOCUMENTS, PAGES, SERVED, Edge, Middleware, caller_here
from kvshare_sched.tenants.reload import TenantsFile

VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["acme", "team", "/x", 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


# ---- the file ----


def places(table: dict, path=()) -> list[tuple]:
    """Every key of a nested table, tables too."""
    found = []
    for name, value in table.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += places(value, (*path, name))
    return found


@settings(max_examples=400)
@given(st.data())
def test_a_good_file_with_one_value_changed_is_read_or_refused_with_its_place(data):
    """Deeper than any text gets: the reader of TOML is put aside."""
    table = tomllib.loads(GOOD)
    path = data.draw(st.sampled_from(places(table)))
    changed = copy.deepcopy(table)
    inside = changed
    for name in path[:-1]:
        inside = inside[name]
    kind = data.draw(st.sampled_from(["another value", "gone", "another name"]))
    value = inside.pop(path[-1])
    if kind == "another value":
        inside[path[-1]] = data.draw(VALUES)
    elif kind == "another name":
        inside[data.draw(st.text(max_size=8))] = value
    original, file.tomllib.loads = file.tomllib.loads, lambda text: changed
    try:
        assert isinstance(parse("", "f"), Tenants)
    except ConfigError as problem:
        assert str(problem).startswith("f: ") and "accepted" in str(problem)
    finally:
        file.tomllib.loads = original


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 30), st.text(max_size=10)), min_size=1, max_size=3))
def test_edits_of_the_file_in_force_change_everything_or_nothing(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_text(GOOD)
    kept = TenantsFile(str(path), 10_000, 10_000, clock=lambda: time.time() + 60)
    before, text = kept.current, GOOD
    for at, length, put in edits:
        text = text[:at] + put + text[at + length :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    os.utime(path, ns=(1, 1))
    try:
        expected = parse(text.encode("utf-8", "surrogatepass").decode("utf-8"), "f")
        expected.check_room(10_000, 10_000, 0)
    except (ConfigError, UnicodeDecodeError):
        assert kept.poll() is before
    else:
        after = kept.poll()
        assert (after.tenants, after.groups, after.keys) == (expected.tenants, expected.groups, expected.keys)


# ---- the door ----

KNOWN = {"tenant": "acme-key", "operator": "root", "gateway": "gate"}
KEYS = f"""
[operators]
keys = ["{hash_of("root")}"]
[gateway]
header = "x-tenant"
keys = ["{hash_of("gate")}"]
"""
DOOR = FILE.replace("[tenants.acme]", f"[tenants.acme]\nkeys = ['{hash_of('acme-key')}']") + KEYS
NAMES = st.sampled_from([b"authorization", b"Authorization", b"x-api-key", b"x-tenant", b"x-other"]) | st.binary(
    max_size=8
)
WORDS = st.sampled_from([b"Bearer acme-key", b"Bearer root", b"Bearer gate", b"acme", b"acme-key", b"Bearer "])
HEADERS = st.lists(st.tuples(NAMES, WORDS | st.binary(max_size=5000)), max_size=4)
PATHS = st.sampled_from([*sorted(SERVED)[:4], DOCUMENTS, PAGES, PAGES + "x", "/flush_cache", "/metrics"]) | st.text()


@settings(max_examples=300)
@given(HEADERS, PATHS, st.sampled_from(["GET", "POST", "OPTIONS", "DELETE", "\x00"]), st.booleans(), st.text())
def test_any_headers_at_the_door_are_somebody_or_a_clean_refusal(tmp_path_factory, headers, path, method, ws, root):
    place = tmp_path_factory.getbasetemp() / "door.toml"
    if not place.exists():
        place.write_text(DOOR)
    edge, sent, seen = Edge(TenantsFile(str(place), 10_000, 10_000), lambda: "mark"), [], []
    before = edge.tenants()

    async def app(scope, receive, send):
        seen.append(caller_here.get())

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket" if ws else "http", "path": path, "headers": headers, "client": ("10.0.0.9", 1)}
    asyncio.run(Middleware(app, edge)(scope | {"method": method, "root_path": root}, None, send))
    values = {value for _, value in headers}
    if seen:
        assert not sent and seen[0] is not None
        asked = path.removeprefix(root)
        known = any(key.encode() in value for key in KNOWN.values() for value in values)
        assert known or asked in {"/health", "/health_generate", "/ready", "/ping"} or method == "OPTIONS"
        assert not seen[0].operator or any(b"root" in value for value in values)
    elif ws:
        assert sent[0]["code"] == 1008
    else:
        assert sent[0]["status"] in (400, 401, 403) and json.loads(sent[1]["body"])["error"]["message"]
    assert edge.tenants() is before and not edge.flights.requests and caller_here.get() is None


# ---- the library's administrators ----

FIELDS = {
    "group": st.sampled_from(["handbook", "", "x"]) | VALUES,
    "name": st.sampled_from(["manual", "new", "a/../b"]) | VALUES,
    "text": st.just("word " * 2000) | VALUES,
    "system": VALUES,
    "ttl_s": st.integers(-1, 10) | VALUES,
}
BODIES = st.fixed_dictionaries({}, optional=FIELDS) | st.dictionaries(st.text(max_size=5), VALUES, max_size=2)


@settings(max_examples=80)
@given(st.sampled_from(["POST", "DELETE", "PUT"]), BODIES, st.booleans(), st.binary(max_size=12))
def test_wrong_requests_of_administrators_leave_the_library_as_it_is(tmp_path_factory, method, body, cut, query):
    world = World(tmp_path_factory.mktemp("admin"))
    world.add()
    before, computed, sent = world.librarian.list(), len(world.manager.sent), []
    good = {"group", "name", "text"} <= body.keys() and body["group"] == "handbook"
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    parts = [{"type": "http.request", "body": raw[: len(raw) // 2], "more_body": True}]
    parts.append({"type": "http.disconnect"} if cut else {"type": "http.request", "body": raw[len(raw) // 2 :]})

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    target = b"group=handbook&name=" + query
    scope = {"type": "http", "method": method, "path": DOCUMENTS, "query_string": target}
    asyncio.run(Admin(world.librarian)(scope, receive, send))
    status, answer = sent[0]["status"], json.loads(sent[1]["body"])
    if status == 200:
        assert method == "POST" and good and not cut
        return
    assert 400 <= status < 500 and answer["error"]["code"] == status and answer["error"]["message"]
    assert world.librarian.list() == before and len(world.manager.sent) == computed
