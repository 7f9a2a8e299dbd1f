"""Who is asking: keys, the gateway's header, nobody; and names of namespaces that never collide."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import OPERATORS, Caller, Refusal, hash_of, identify
from kvshare_sched.tenants.namespaces import engine_mark, frame, name_of, owner_of, unframe, within

FILE = f"""
unknown = "anonymous"
[gateway]
header = "x-tenant"
keys = ["{hash_of("gateway-key")}"]
[operators]
keys = ["{hash_of("operator-key")}"]
[tenants.acme]
keys = ["{hash_of("acme-key")}", "{hash_of("acme-second")}"]
[tenants.globex]
keys = ["{hash_of("globex-key")}"]
"""
OPEN, CLOSED = parse(FILE, "f"), parse(FILE.replace("anonymous", "reject"), "f")
ANY = parse(FILE.replace("anonymous", "anonymous-any-key"), "f")


def who(*headers, tenants=OPEN):
    found = identify([(name.encode(), value.encode()) for name, value in headers], tenants)
    return found.tenant.name if isinstance(found, Caller) else found.status


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([("authorization", "Bearer acme-key")], "acme"),
        ([("Authorization", "bearer  acme-second ")], "acme"),
        ([("x-api-key", "globex-key")], "globex"),
        ([("authorization", "Bearer acme-key"), ("x-api-key", "acme-key")], "acme"),
        ([("authorization", "Bearer gateway-key"), ("x-tenant", "globex")], "globex"),
        ([("x-api-key", "gateway-key"), ("x-tenant", " acme ")], "acme"),
    ],
)
def test_a_known_key_or_the_gateway_says_who(headers, name):
    assert who(*headers) == who(*headers, tenants=CLOSED) == who(*headers, tenants=ANY) == name


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Basic acme-key")],
        [("authorization", "acme-key")],
        [("authorization", "Bearer")],
        [("x-tenant", "acme")],  # no gateway's key
        [("authorization", "Bearer gateway-key")],
    ],
)
def test_whoever_brings_no_key_gets_the_default(headers):
    assert who(*headers) == who(*headers, tenants=ANY) == "anonymous"
    assert who(*headers, tenants=CLOSED) == 401


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer wrong")],
        [("x-tenant", "acme"), ("authorization", "Bearer wrong")],
        [("authorization", "Bearer gateway-key"), ("x-tenant", "nobody")],
        [("authorization", f"Bearer {hash_of('acme-key')}")],
        [("authorization", "Bearer " + "k" * 10_000)],
        [("authorization", "Bearer \xff\u00e9")],
    ],
)
def test_a_key_that_nobody_has_is_refused_unless_the_file_says_otherwise(headers):
    assert who(*headers) == who(*headers, tenants=CLOSED) == 401
    assert who(*headers, tenants=ANY) == "anonymous"


def test_a_tenants_key_outweighs_a_header_only_the_gateway_may_set():
    assert who(("authorization", "Bearer acme-key"), ("x-tenant", "globex")) == "acme"


def test_ambiguity_is_refused():
    assert who(("authorization", "Bearer acme-key"), ("x-api-key", "globex-key")) == 400
    assert who(("x-api-key", "acme-key"), ("x-api-key", "globex-key")) == 400
    assert who(("x-api-key", "gateway-key"), ("x-tenant", "acme"), ("x-tenant", "globex")) == 400


def test_an_operator_is_no_tenant():
    found = identify([(b"authorization", b"Bearer operator-key")], CLOSED)
    assert found == Caller(OPERATORS, operator=True)
    assert not identify([(b"authorization", b"Bearer acme-key")], CLOSED).operator


def test_a_refusal_names_nobody():
    assert "acme" not in identify([], CLOSED).message


@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"x-tenant"]), st.binary(max_size=40))))
def test_any_header_gets_an_answer(headers):
    found = identify(headers, CLOSED)
    assert isinstance(found, Refusal) and found.status in (400, 401)


# ---- names ----

TRICKY = [
    None,
    "a",
    "b",
    "ab",
    "bc",
    "abc",
    "1:a",
    "-",
    "--",
    "1:a1:b",
    "1",
    ":",
    "a" * 10_000,
    "é",
    "e\u0301",
    "\U0001f600",
]


def test_no_two_tuples_share_a_frame():
    for count in (1, 2, 3):
        tuples = list(itertools.product(TRICKY if count < 3 else TRICKY[:12], repeat=count))
        assert len({frame(*parts) for parts in tuples}) == len(tuples)


@given(st.lists(st.none() | st.text(min_size=1), max_size=5))
def test_a_frame_reads_back(parts):
    assert unframe(frame(*parts)) == tuple(parts)


@given(st.text(max_size=30))
def test_any_text_is_a_frame_or_none(text):
    parts = unframe(text)
    assert parts is None or frame(*parts) == text


@given(st.text(), st.text(), st.text(), st.text())
def test_what_is_appended_to_a_name_makes_no_other_name(a, b, x, y):
    if (a or None) != (b or None):
        assert name_of("m", "tenant", a) + x != name_of("m", "tenant", b) + y


def test_empty_is_absent_and_the_order_of_fields_counts():
    assert within(None, None) is within("", "") is within("", None) is None
    names = [within(*pair) for pair in (("a", "bc"), ("ab", "c"), ("abc", None), (None, "abc"), ("", "abc"))]
    assert len(set(names)) == 4 and names[3] == names[4]


def test_raw_salts_go_no_further():
    assert "secret" not in within("secret", "secret-salt") and len(within("x", "y" * 10_000)) == 64


def test_owners_of_namespaces():
    assert owner_of(name_of("m", "tenant", "acme")) == "acme"
    assert owner_of(name_of("m", "documents", "handbook")) == "documents:handbook"
    for other in (None, "", "acme", "7:kvshare", "7:kvshare1:m", frame("kvshare", "m", "else", "acme"), "7:kvshare9:x"):
        assert owner_of(other) == (other or "")


def test_long_keys_of_clients_are_not_remembered():
    from kvshare_sched.tenants.namespaces import _owner_of

    _owner_of.cache_clear()
    assert owner_of("k" * 10_000) == "k" * 10_000 and _owner_of.cache_info().currsize == 0
    assert owner_of(name_of("0" * 16, "documents", "g" * 64)) == "documents:" + "g" * 64
    assert _owner_of.cache_info().currsize == 1


def test_the_mark_changes_with_everything_in_it():
    assert (
        len(
            {engine_mark("m", None, 1), engine_mark("m", "None", 1), engine_mark("m", None, 2), engine_mark("m1", None)}
        )
        == 4
    )
