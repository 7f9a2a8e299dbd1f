"""The tenants file: what it accepts, what it says about what it does not, and that a bad edit changes nothing."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants import reload
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tenants.reload import TenantsFile

A, B, C = (hash_of(name * 20) for name in "abc")
GOOD = f"""
unknown = "reject"
[gateway]
header = "X-KVShare-Tenant"
keys = ["{C}"]
[operators]
keys = ["{hash_of("operator")}"]
open = ["/metrics"]
[library]
tokens = 1000
[groups.handbook]
[groups.team]
trusted = true
[tenants.acme]
keys = ["{A}"]
groups = ["team", "handbook"]
weight = 2
priority = 5
target_kl = 0.02
requests = 8
tokens = 10000
donor_tokens = 5000
guaranteed_donor_tokens = 2000
[tenants.globex]
keys = ["{B}"]
groups = ["handbook"]
"""


def test_everything_is_read():
    found = parse(GOOD, "f")
    acme = found.tenants["acme"]
    assert (acme.groups, acme.weight, acme.priority, acme.target_kl) == (("handbook", "team"), 2.0, 5, 0.02)
    assert (acme.requests, acme.tokens, acme.donor_tokens, acme.guaranteed_donor_tokens) == (8, 10000, 5000, 2000)
    assert found.tenants["globex"].weight == 1.0 and found.tenants["globex"].requests is None
    assert found.groups["handbook"].members == ("acme", "globex") and not found.groups["handbook"].trusted
    assert found.groups["team"].members == ("acme",) and found.groups["team"].trusted
    assert found.anonymous is None and found.gateway_header == "x-kvshare-tenant"
    assert found.keys == {A.removeprefix("sha256:"): "acme", B.removeprefix("sha256:"): "globex"}
    assert found.open_paths == {"/metrics"} and found.promised == 3000


def test_a_file_that_declares_nothing_knows_nobody_and_shares_nothing():
    found = parse("unknown = 'anonymous'", "f")
    assert not found.tenants and not found.groups and found.anonymous.groups == () and found.promised == 0
    assert not found.any_key and parse("unknown = 'anonymous-any-key'", "f").any_key


@pytest.mark.parametrize(
    "text", ["", "# emptied", "[tenants.acme]", GOOD.split("[gateway]")[1].join(["[gateway]", ""])]
)
def test_a_file_without_its_first_line_opens_no_server(text):
    with pytest.raises(ConfigError, match="unknown = 'None'"):
        parse(text, "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unknown = 'allow'", ("unknown", "'allow'", "reject, anonymous, anonymous-any-key")),
        ("tenant = 1", ("tenant is not known", "did you mean tenants")),
        ("[tenants.acme]\nwieght = 1", ("tenants.acme.wieght", "did you mean weight")),
        ("[tenants.acme]\nweight = 0", ("tenants.acme.weight", "'0.0'", "0.01 to 10000")),
        ("[tenants.acme]\nweight = nan", ("tenants.acme.weight", "'nan'")),
        ("[tenants.acme]\nweight = 'a'", ("tenants.acme.weight", "'a'", "a number")),
        ("[tenants.acme]\nrequests = true", ("tenants.acme.requests", "'True'", "whole number")),
        ("[tenants.acme]\ngroups = ['team']\n[groups.teams]", ("tenants.acme.groups", "'team'", "did you mean teams")),
        ("[tenants.acme]\ngroups = 'team'", ("tenants.acme.groups", "a list of texts")),
        ("[tenants.'Acme Ltd']", ("tenants", "'Acme Ltd'", "names of a-z")),
        ("[tenants.anonymous]", ("anonymous", "another name")),
        ("tenants = 3", ("tenants", "'3'", "a table")),
        ("[tenants]\nacme = 3", ("tenants.acme", "'3'", "a table")),
        (
            "[tenants.acme]\ndonor_tokens = 5\nguaranteed_donor_tokens = 6",
            ("guaranteed_donor_tokens", "'6'", "at most"),
        ),
        (f"[tenants.a]\nkeys = ['{A}']\n[tenants.b]\nkeys = ['{A}']", ("tenants.b.keys", "one of a", "one owner")),
        (f"[operators]\nkeys = ['{A}']\n[tenants.b]\nkeys = ['{A}']", ("operators.keys", "one of b")),
        ("[groups.team]\ntrusted = 1", ("groups.team.trusted", "true or false")),
        ("[gateway]\nheader = 'authorization'\nkeys = []", ("gateway.header", "'authorization'")),
        ("[gateway]\nheader = 'x-t'", ("gateway.keys", "anybody could set the header")),
        ("[operators]\nopen = ['metrics']", ("operators.open", "'metrics'", "begin with /")),
        ("[anonymous]\nkeys = []", ("anonymous.keys is not known",)),
        ("[anonymous]\ndonor_tokens = 5", ("anonymous.donor_tokens is not known",)),
        ("x = " + "9" * 5000, ("not readable as TOML",)),
        ("x = " + "[" * 100_000, ("not readable as TOML",)),
        ("[tenants", ("not readable as TOML",)),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_what_is_accepted(text, said):
    with pytest.raises(ConfigError) as caught:
        parse(text if text.startswith("unknown") else f"unknown = 'reject'\n{text}", "tenants.toml")
    assert "tenants.toml" in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_a_key_in_the_clear_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        parse("unknown = 'reject'\n[tenants.acme]\nkeys = ['my-secret-key']", "f")
    assert "tenants.acme.keys" in str(caught.value) and "secret" not in str(caught.value)


def test_hashes_of_keys_stay_out_of_what_may_be_printed():
    assert A.removeprefix("sha256:") not in repr(parse(GOOD, "f"))


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_any_text_is_accepted_or_refused_in_one_way(text):
    try:
        parse(text, "f")
    except ConfigError as problem:
        assert str(problem).startswith("f: ")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
_TABLE = st.sampled_from(["unknown", "anonymous", "gateway", "operators", "groups", "tenants", "library"])


@given(st.dictionaries(_TABLE, _VALUES | st.dictionaries(st.just("acme"), _VALUES, max_size=1), max_size=3))
def test_any_value_anywhere_is_accepted_or_refused_in_one_way(data):
    """The reader of TOML is put aside, so that values of all types reach the checks."""
    from kvshare_sched.tenants import file

    original, file.tomllib.loads = file.tomllib.loads, lambda text: data
    try:
        parse("", "f")
    except ConfigError:
        pass
    finally:
        file.tomllib.loads = original


def test_more_promised_than_there_is_room_for_is_refused():
    found = parse(GOOD, "f")
    found.check_room(pool=6000, index=3000, longest=3000)
    for room in ((5998, 10_000, 0), (10_000, 2999, 0), (10_000, 10_000, 7001), (10_000, 10_000, 20_000)):
        with pytest.raises(ConfigError, match="sum up to 3000"):
            found.check_room(*room)


# ---- read again ----

FIRST = "unknown = 'reject'\n"


class Edits:
    """A file and the clock that its reader sees."""

    def __init__(self, folder):
        self.path, self.ahead = folder / "tenants.toml", 60.0
        self.write("[tenants.acme]")
        self.file = TenantsFile(str(self.path), 10_000, 10_000, clock=lambda: time.time() + self.ahead)

    def write(self, text, first=FIRST):
        self.path.write_text(first + text)


@pytest.fixture
def edits(tmp_path):
    return Edits(tmp_path)


def test_an_edit_is_read_and_a_bad_one_changes_nothing(edits, caplog):
    file, before = edits.file, edits.file.poll()
    assert file.poll() is before, "an unchanged file is not read again"
    edits.write("[tenants.acme]\nweight = -1")
    assert file.poll() is before and "tenants.acme.weight" in caplog.text
    caplog.clear()
    assert file.poll() is before and not caplog.text, "said once"
    edits.write("[tenants.acme]\nguaranteed_donor_tokens = 9000")
    assert file.poll() is before and "sum up to 9000" in caplog.text
    edits.write("[tenants.acme]\n[tenants.globex]")
    assert set(file.poll().tenants) == {"acme", "globex"}
    edits.path.unlink()
    for _ in range(2):
        assert set(file.poll().tenants) == {"acme", "globex"}
    assert caplog.text.count("cannot be read") == 1


def test_a_file_that_is_being_written_waits(edits, monkeypatch):
    edits.write("[tenants.globex]")
    edits.ahead = 0.0
    assert set(edits.file.poll().tenants) == {"acme"}, "changed a moment ago"
    edits.ahead = 60.0
    read = reload.read

    def slow(path):
        found = read(path)
        edits.write("[tenants.globex]\n[tenants.hooli]")
        monkeypatch.setattr(reload, "read", read)
        return found

    monkeypatch.setattr(reload, "read", slow)
    assert set(edits.file.poll().tenants) == {"acme"}, "changed while it was read"
    assert set(edits.file.poll().tenants) == {"globex", "hooli"}


def test_a_file_that_could_not_be_read_is_tried_again(edits, monkeypatch):
    edits.write("[tenants.globex]")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError("too many open files")))
        assert set(edits.file.poll().tenants) == {"acme"}
    assert set(edits.file.poll().tenants) == {"globex"}, "its date has not changed"


def test_a_file_with_the_date_and_size_of_the_old_one_is_read(edits):
    edits.write("[tenants.acme]")
    os.utime(edits.path, (1000, 1000))
    edits.file.poll()
    with open(edits.path, "r+") as file:
        file.write(FIRST + "[tenants.emca]")
    os.utime(edits.path, (1000, 1000))
    assert set(edits.file.poll().tenants) == {"emca"}


def test_other_promises_are_another_revision(edits):
    def revision(text):
        edits.write(text)
        return edits.file.poll().revision

    kept = "[tenants.acme]\nguaranteed_donor_tokens = 9"
    assert [revision(text) for text in (kept, kept + "\nweight = 2", "[tenants.acme]", "[groups.team]")] == [1, 1, 2, 3]


def test_a_bad_file_is_refused_at_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TenantsFile(str(tmp_path / "none.toml"), 1, 1)


def test_a_trusted_group_is_announced_loudly(tmp_path, caplog):
    path = tmp_path / "tenants.toml"
    path.write_text(
        FIRST + "[groups.team]\ntrusted = true\n[tenants.acme]\ngroups = ['team']\n[tenants.globex]\ngroups = ['team']"
    )
    TenantsFile(str(path), 1, 1)
    loud = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "TRUSTED GROUP team" in loud[0].getMessage() and "acme, globex" in loud[0].getMessage()
