"""The library: what is kept on disk, what the server sends itself, and the administrators' requests."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants.admin import Admin
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.librarian import Librarian
from kvshare_sched.tenants.library import Document, Library, Rejected, checked
from kvshare_sched.tenants.middleware import Edge, own_request
from kvshare_sched.tenants.namespaces import owner_of
from kvshare_sched.tenants.policy import read
from kvshare_sched.tenants.reload import TenantsFile

FILE = "unknown = 'reject'\n[library]\ntokens = 1000\n[groups.handbook]\n[tenants.acme]\ngroups = ['handbook']"


class Manager:
    """A tokenizer manager over an engine that caches whole prompts: one token a word."""

    max_req_input_len, context_len = 600, 700

    def __init__(self):
        self.sent, self.cached, self.fails, self.aborts, self.bad = [], set(), False, False, None
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens=True: [1] * add_special_tokens + [len(w) + 2 for w in text.split()]
        )

    async def generate_request(self, obj, request):
        assert own_request.get()
        if self.fails or (self.bad is not None and self.bad in obj.input_ids):
            raise RuntimeError("the engine is gone")
        stamp = read(obj.sampling_params["custom_params"])
        if self.aborts:
            yield {"meta_info": {"cached_tokens": 0, "finish_reason": {"type": "abort"}}}
            return
        self.sent.append(("forget" if stamp.forget else "compute", obj.extra_key, stamp.document, len(obj.input_ids)))
        key = (obj.extra_key, tuple(obj.input_ids))
        hit, _ = key in self.cached, self.cached.add(key)
        self.stamp, self.obj = stamp, obj
        yield {"meta_info": {"cached_tokens": len(obj.input_ids) - 1 if hit else 0}}


class World:
    def __init__(self, folder):
        self.folder, self.now = folder, 1000.0
        path = folder / "tenants.toml"
        path.write_text(FILE)
        self.manager = Manager()
        self.edge = Edge(TenantsFile(str(path), 10_000, 10_000), lambda: "mark")
        self.start()

    def start(self):
        library = Library(str(self.folder / "library"))
        self.shown = []  # how many documents were resident, and how many not
        self.librarian = Librarian(
            library, self.edge, self.manager, GenerateReqInput, clock=lambda: self.now, show=self.show
        )

    def show(self, documents):
        there = sum(document["resident"] for document in documents)
        self.shown.append((there, len(documents) - there))

    def add(self, name="manual", text="word " * 100, **more):
        return asyncio.run(self.librarian.add(checked({"group": "handbook", "name": name, "text": text} | more)))

    def look(self):
        self.manager.sent.clear()
        asyncio.run(self.librarian.look_after())
        return [kind for kind, *_ in self.manager.sent]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# ---- documents ----


def test_a_document_is_computed_alone_in_its_groups_namespace(world):
    found = world.add(system="Be brief.")
    assert (found.tokens, found.version, found.expires) == (103, 1, None)
    kind, extra_key, label, length = world.manager.sent[0]
    assert (kind, owner_of(extra_key), length) == ("compute", "documents:handbook", 103)
    assert label == found.label and "manual" not in label
    assert world.manager.obj.cache_salt is None and not own_request.get()
    assert world.manager.stamp.guaranteed == 103 and not world.manager.stamp.lenders
    assert world.manager.obj.sampling_params["custom_params"]["kvshare"] == "off"
    assert world.librarian.list()[0]["resident"] and "text" not in world.librarian.list()[0]


def test_a_new_text_is_a_new_version_and_the_old_one_is_forgotten(world):
    old = world.add()
    new = world.add(text="other words " * 50)
    assert new.version == 2 and len(world.librarian.list()) == 1
    assert [(kind, label) for kind, _, label, _ in world.manager.sent[1:]] == [
        ("compute", new.label),
        ("forget", old.label),
    ]
    assert world.look() == ["compute"], "what both begin with was found under the old one"


def test_the_same_text_again_only_lives_longer(world):
    world.add(ttl_s=10)
    world.now = 1005.0
    again = world.add(ttl_s=10)
    assert (again.version, again.expires, len(world.manager.sent)) == (1, 1015.0, 1)


def test_what_does_not_fit_is_refused_and_changes_nothing(world):
    world.add(text="word " * 500)
    for name, text, status in (("b", "word " * 500, 409), ("c", "word " * 600, 413)):
        with pytest.raises(Rejected) as caught:
            world.add(name, text)
        assert caught.value.status == status
    with pytest.raises(Rejected, match="not declared"):
        asyncio.run(world.librarian.add(checked({"group": "nobody", "name": "a", "text": "x"})))
    assert [d["name"] for d in world.librarian.list()] == ["manual"] and len(world.manager.sent) == 1


def test_a_document_that_could_not_be_computed_is_not_kept(world):
    world.manager.fails = True
    with pytest.raises(RuntimeError):
        world.add()
    assert not world.librarian.list() and not Library(str(world.folder / "library")).documents
    world.manager.fails = False
    assert world.look() == ["forget"], "it may have been computed all the same"


def test_a_new_version_that_could_not_be_computed_leaves_the_old_one(world):
    old = world.add()
    world.manager.fails = True
    with pytest.raises(RuntimeError):
        world.add(text="other words " * 50)
    world.manager.fails = False
    assert world.look() == ["forget", "compute"] and world.manager.sent[0][2] != old.label
    assert Library(str(world.folder / "library")).documents == {old.key: old}


def test_a_document_that_cannot_be_written_is_not_lent(world, monkeypatch):
    monkeypatch.setattr(Library, "put", lambda self, document: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        world.add()
    assert not world.manager.sent and not world.librarian.list()


@pytest.mark.parametrize("how", ["fails", "aborts"])
def test_what_is_taken_back_counts_as_lent_until_the_engine_confirms(world, how):
    found = world.add(text="word " * 500)
    setattr(world.manager, how, True)
    for _ in range(2):
        asyncio.run(world.librarian.remove(found.key))
        assert not world.librarian.list() and not world.librarian.dropped(found)
    assert not Library(str(world.folder / "library")).documents, "gone for good, whatever the engine says"
    setattr(world.manager, how, False)
    world.manager.sent.clear()
    with pytest.raises(Rejected, match="would hold 1002"):
        world.add("other", text="word " * 500)
    assert world.look() == ["forget"] and world.librarian.dropped(found)
    assert world.look() == []
    with pytest.raises(Rejected, match="no document"):
        asyncio.run(world.librarian.remove(found.key))


def test_a_name_used_again_before_the_old_text_is_dropped_is_another_version(world):
    old = world.add()
    world.manager.fails = True
    asyncio.run(world.librarian.remove(old.key))
    world.manager.fails = False
    new = world.add(text="other words " * 50)
    assert new.version == 2 and [label for kind, _, label, _ in world.manager.sent if kind == "forget"] == [old.label]


def test_taking_back_goes_before_everything(world):
    world.edge.sign = -1
    found = world.add()
    assert world.manager.obj.priority is None
    asyncio.run(world.librarian.remove(found.key))
    assert world.manager.stamp.forget and world.manager.obj.priority == -(2**31)


# ---- looking after ----


def test_a_restarted_server_computes_everything_again(world):
    for name in "abc":
        world.add(name, text=f"{name * 5} " * 100)
    world.manager.cached.clear()
    world.start()
    assert not any(d["resident"] for d in world.librarian.list())
    assert world.shown == [(0, 3)]
    assert world.look() == ["compute"] * 3
    assert world.shown[-1] == (3, 0)
    assert all(d["resident"] for d in world.librarian.list())


def test_one_look_at_a_time_and_all_again_when_the_cache_was_emptied(world):
    for name in "abc":
        world.add(name, text=f"{name * 5} " * 100)
    assert world.look() == ["compute"]
    labels = []
    for _ in range(3):
        world.look()
        labels.append(world.manager.sent[0][2])
    assert len(set(labels)) == 3, "in turn"
    world.manager.cached.clear()
    assert world.look() == ["compute"]
    assert world.shown[-1] == (1, 2)
    assert world.look() == ["compute"] * 3, "the two others, and the first in turn"
    assert world.look() == ["compute"]


def test_one_document_that_cannot_be_computed_stops_no_other(world, caplog):
    for name in "abc":
        world.add(name, text=f"{name * 5} {'word ' * (100 + ord(name))}")
    world.add("bad", text="x" * 70 + " word" * 50)
    world.manager.cached.clear()
    world.start()
    world.manager.bad = 72
    assert world.look() == ["compute"] * 3 and "RuntimeError" in caplog.text
    assert {d["name"] for d in world.librarian.list() if d["resident"]} == set("abc")
    world.manager.cached.clear()
    assert world.look() == ["compute"], "and it hides no flush"
    assert world.look() == ["compute"] * 3


def test_only_declared_groups_are_computed_and_only_up_to_the_budget(world):
    for name in "abc":
        world.add(name, text=f"{name * 5} " * 100)
    world.manager.cached.clear()
    world.start()
    less = FILE.replace("1000", "250")
    world.edge._file.current = parse(less, "f")
    assert world.look() == ["compute"] * 2, "the first two fit"
    assert world.manager.stamp.guaranteed == 202
    world.edge._file.current = parse(less.replace("handbook", "other"), "f")
    assert world.look() == []


def test_groups_together_pin_no_more_than_the_budget(world):
    world.edge._file.current = parse(FILE + "\n[groups.other]", "f")
    world.add("a", text="word " * 500)
    asyncio.run(world.librarian.add(checked({"group": "other", "name": "b", "text": "word " * 400})))
    assert world.manager.stamp.tenant == "documents:other" and world.manager.stamp.guaranteed == 401


def test_documents_are_held_under_the_promises_in_force(world):
    """The engine believes no older ones."""
    world.add()
    assert world.manager.stamp.revision == 0
    world.edge._file.current = replace(world.edge._file.current, revision=3)
    world.look()
    assert world.manager.stamp.revision == 3


def test_texts_are_tokenised_beside_the_loop_and_once(world):
    import threading

    threads, encode = [], world.manager.tokenizer.encode
    world.manager.tokenizer.encode = lambda *a, **k: threads.append(threading.current_thread()) or encode(*a, **k)
    world.add()
    world.look()
    world.look()
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_a_ttl_that_is_renewed_while_it_ends_is_kept(world):
    world.add("short", ttl_s=10)
    world.now = 1010.0
    due = world.librarian.library.expired(world.now)
    world.add("short", ttl_s=10)
    asyncio.run(world.librarian.remove(due[0].key, only_expired=True))
    assert [d["name"] for d in world.librarian.list()] == ["short"]


def test_large_pages_are_no_eviction(world):
    world.librarian = Librarian(world.librarian.library, world.edge, world.manager, GenerateReqInput, page=256)
    found = world.add(text="word " * 500)

    async def paged(obj, request):
        yield {"meta_info": {"cached_tokens": 256}}  # whole pages of 501 tokens

    world.manager.generate_request = paged
    assert asyncio.run(world.librarian._compute(found.key))


def test_what_expires_goes(world):
    world.add("short", ttl_s=10)
    world.add("long", text="z " * 100)
    world.now = 1010.0
    assert world.look() == ["forget", "compute"]
    assert [d["name"] for d in world.librarian.list()] == ["long"]


def test_a_failing_round_ends_neither_the_server_nor_the_library(world, caplog):
    world.add()
    world.manager.fails = True

    async def two_rounds(monkeypatch=None):
        task = asyncio.create_task(world.librarian.run())
        await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()

    asyncio.run(two_rounds())
    assert "could not be computed" in caplog.text and world.librarian.list()


# ---- on disk ----


def test_files_that_are_no_documents_are_left_alone(tmp_path, caplog):
    library = Library(str(tmp_path))
    library.put(Document("handbook", "a\u00e9/..", "text", tokens=1))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"x": 1}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    good = {"group": "handbook", "name": "b", "text": "x"}
    for n, wrong in enumerate(({"text": 3}, {"tokens": "3"}, {"expires": "never"}, {"group": None}, {"version": True})):
        (tmp_path / f"wrong{n}.json").write_text(json.dumps(good | wrong))
    again = Library(str(tmp_path))
    assert again.documents == library.documents and (tmp_path / "broken.json").exists()
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*")), "names lead nowhere else"
    again.drop(("handbook", "a\u00e9/.."))
    assert not Library(str(tmp_path)).documents


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="KVSHARE_LIBRARY"):
        Library(str(tmp_path / "file" / "below"))


# ---- over HTTP ----


def call(world, method, body=b"", query=b"", path="/kvshare/documents"):
    sent = []
    parts = [{"type": "http.request", "body": body[:7], "more_body": True}, {"type": "http.request", "body": body[7:]}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query}
    asyncio.run(Admin(world.librarian)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_documents_over_http(world):
    body = json.dumps({"group": "handbook", "name": "a b", "text": "word " * 50, "ttl_s": 60}).encode()
    assert call(world, "POST", body) == (200, {"group": "handbook", "name": "a b", "version": 1, "tokens": 51})
    assert call(world, "GET")[1]["documents"][0]["expires"] == 1060.0
    world.manager.fails = True
    assert call(world, "DELETE", query=b"group=handbook&name=a%20b")[0] == 202
    world.manager.fails = False
    status, told = call(world, "DELETE", query=b"group=handbook&name=a%20b")
    assert status == 200 and told["dropped"]
    assert call(world, "DELETE", query=b"group=handbook&name=a%20b")[0] == 404
    assert call(world, "PATCH")[0] == 405 and call(world, "GET", path="/kvshare/else")[0] == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"[1]", "JSON object"),
        (b'{"group": "handbook", "name": "a"}', "text must be"),
        (b'{"group": "handbook", "name": "a\\u0000", "text": "x"}', "name must"),
        (b'{"group": "handbook", "name": "a", "text": " "}', "empty"),
        (b'{"group": "handbook", "name": "a", "text": "x", "ttl_s": -1}', "ttl_s"),
        (b'{"group": "handbook", "name": "a", "text": "x", "ttl_s": NaN}', "ttl_s"),
        (b'{"group": "handbook", "name": "a", "text": "x", "ttl": 1}', "'ttl' is not known"),
        (b"[" * 100_000, "no JSON"),
        (b'{"group": "handbook", "name": "a", "text": "\\ud800"}', "surrogate"),
    ],
)
def test_wrong_bodies_are_the_clients_fault(world, body, said):
    status, answer = call(world, "POST", body)
    assert status == 400 and said in answer["error"]["message"] and not world.manager.sent


@settings(max_examples=100)
@given(
    st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps).map(str.encode),
    st.binary(max_size=40),
)
def test_no_request_of_an_administrator_breaks_anything(tmp_path_factory, method, body, query):
    world = World(tmp_path_factory.mktemp("fuzz"))
    status, _ = call(world, method, body, query)
    assert status == 200 if method == "GET" else 400 <= status < 500
    assert not world.librarian.list() and not world.manager.sent


def test_a_failure_of_the_engine_is_told_without_details(world):
    world.manager.fails = True
    body = json.dumps({"group": "handbook", "name": "a", "text": "secret words"}).encode()
    status, answer = call(world, "POST", body)
    assert status == 503 and "gone" not in json.dumps(answer)
