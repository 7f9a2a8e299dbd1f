"""Who lends to whom, on a fake tree: default deny and its positive controls, quotas, the record, what a client sees."""

import json
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeTree, NamedPipeline
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sched.observe import explain
from kvshare_sched.records.request import Outcome, Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.borrow_log import BorrowLog
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.namespaces import DOCUMENTS, TENANT, name_of, namespace, within
from kvshare_sched.tenants.policy import Stamp, lenders, stamp_of
from kvshare_sched.tenants.scheduler_state import Desk, lenders_of
from radix_ext.hashing import window_hashes
from radix_ext.index import SegmentIndex
from radix_ext.limits import DonorLimits, to_hold
from radix_ext.records import Donor, Namespace

COSTS = CostModel(cell_s=1e-4, copy_s=1e-7, overhead_s=0.0, layers=4)
SETTINGS = {"strategy": "dhd", "window": 16, "min_run": 32, "min_suffix": 64, "forced_head": 8, "ratio": 0.1}
FILE = """
unknown = "reject"
[groups.handbook]
[groups.team]
trusted = true
[tenants.acme]
groups = ["handbook"]
guaranteed_donor_tokens = 250
[tenants.globex]
groups = ["handbook", "team"]
[tenants.initech]
groups = ["team"]
[tenants.hooli]
"""
TENANTS = parse(FILE, "f")
MARK = "mark"
LIBRARY = namespace(name_of(MARK, DOCUMENTS, "handbook"))


def space(name: str, salt: str | None = None) -> Namespace:
    return namespace(name_of(MARK, TENANT, name), within(None, salt))


def text(seed: int, length: int = 600) -> np.ndarray:
    """Ids of one seed never meet those of another."""
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


def prompt(*seeds: int) -> np.ndarray:
    """Texts between words of their own."""
    parts = [text(90, 10)]
    for n, seed in enumerate(seeds):
        parts += [text(seed), text(91 + n, 20)]
    return np.concatenate(parts)


class World:
    def __init__(self, log=None, **settings):
        self.tree, self.desk = FakeTree(), Desk(log)
        self.pipeline = NamedPipeline(KVShareConfig(**SETTINGS | settings), self.tree, COSTS, desk=self.desk)
        self.count = 0

    def donate(self, namespace: Namespace, *seeds: int, lead: int = 50) -> None:
        self.count += 1
        tokens = np.concatenate((text(lead, 5), *(text(seed) for seed in seeds)))
        self.pipeline.publish(f"donor {self.count}", namespace, tokens)

    def ask(
        self, name: str, tokens: np.ndarray, salt=None, stamp: Stamp | None = None, rid="r", upto=None, fails=False
    ):
        """(true report, report the client gets) of one request; upto: prompt tokens that ran before it was aborted."""
        stamp = stamp or stamp_of(TENANTS.tenants[name], TENANTS, MARK, 0)
        namespace = space(name, salt)
        view = RequestView(rid, namespace, tokens, 0, len(tokens), {}, lenders_of(stamp, namespace))
        session = self.pipeline.admit(view, rid, len(tokens), 0, stamp)
        told = []
        session.on_report = told.append
        self.pipeline.begin(session)
        true = session.report(self.pipeline.costs)
        self.pipeline.chunk_done(session, len(tokens) if upto is None else upto)
        if fails:
            self.pipeline.abandon(session)
        self.capture = session.capture  # of an audit, if it was chosen for one
        self.pipeline.release(rid)
        return true, told[0]

    def send_document(self, name: str, tokens: np.ndarray, forget: bool = False, guaranteed: int = 10**6) -> None:
        """As the server's own request does it."""
        stamp = Stamp("documents:handbook", document=name, forget=forget, guaranteed=guaranteed)
        session = self.pipeline.admit(Reason.OPTED_OUT, name, len(tokens), 0, stamp)
        self.pipeline.begin(session)
        self.pipeline.publish(name, LIBRARY, tokens)
        self.pipeline.release(name)


@pytest.fixture
def world():
    made = World()
    yield made
    assert made.tree.active == 0, "a lease leaked"
    made.pipeline.index._check()


# ---- default deny, and what is permitted does hit ----


def test_the_same_text_of_two_tenants_never_crosses_and_ones_own_does_hit(world):
    world.donate(space("hooli"), 1)
    for name in ("acme", "globex", "initech"):
        assert world.ask(name, prompt(1))[0].reason is Reason.NO_MATCH
    assert world.ask("hooli", prompt(1))[0].reused == 600


def test_a_salt_sets_a_tenants_own_requests_apart(world):
    world.donate(space("acme", "a"), 1)
    assert world.ask("acme", prompt(1))[0].reused == 0
    assert world.ask("acme", prompt(1), salt="b")[0].reused == 0
    assert world.ask("acme", prompt(1), salt="a")[0].reused == 600


def test_documents_are_lent_to_the_group_and_to_nobody_else(world):
    world.donate(LIBRARY, 1)
    assert world.ask("acme", prompt(1))[0].reused == world.ask("globex", prompt(1), salt="s")[0].reused == 600
    assert world.ask("initech", prompt(1))[0].reused == world.ask("hooli", prompt(1))[0].reused == 0


def test_conversations_are_lent_in_a_trusted_group_only(world):
    world.donate(space("globex"), 1)
    world.donate(space("globex", "set apart"), 2)
    assert world.ask("initech", prompt(1))[0].reused == 600
    assert world.ask("initech", prompt(2))[0].reused == 0, "what a client sets apart is lent to nobody"
    assert world.ask("acme", prompt(1))[0].reused == 0, "sharing documents is no trust"


def test_a_change_of_groups_counts_from_the_next_request_on(world):
    world.donate(LIBRARY, 1)
    assert world.ask("acme", prompt(1))[0].reused == 600
    left = parse(FILE.replace('[tenants.acme]\ngroups = ["handbook"]', "[tenants.acme]"), "f")
    assert world.ask("acme", prompt(1), stamp=stamp_of(left.tenants["acme"], left, MARK, 0))[0].reused == 0


def test_another_engine_mark_is_another_namespace(world):
    world.donate(LIBRARY, 1)
    stamp = stamp_of(TENANTS.tenants["acme"], TENANTS, "other", 0)
    assert world.ask("acme", prompt(1), stamp=stamp)[0].reused == 0


def test_the_policy_as_data():
    def rules(name):
        return [(one.rule, one.group, one.extra_key) for one in lenders(TENANTS.tenants[name], TENANTS, MARK)]

    assert rules("hooli") == []
    assert rules("acme") == [("document", "handbook", LIBRARY.extra_key)]
    assert rules("globex") == [
        ("document", "handbook", LIBRARY.extra_key),
        ("document", "team", name_of(MARK, DOCUMENTS, "team")),
        ("trusted", "team", name_of(MARK, TENANT, "initech")),
    ]


def test_a_group_that_is_gone_lends_nothing():
    assert list(lenders(TENANTS.tenants["globex"], parse("unknown = 'reject'", "f"), MARK)) == []


def test_a_stamp_reads_back():
    stamp = stamp_of(TENANTS.tenants["globex"], TENANTS, MARK, 3)
    assert Stamp.from_text(stamp.to_text()) == stamp


# ---- side channels ----


@given(st.lists(st.tuples(st.sampled_from(["globex", "initech", "hooli"]), st.integers(1, 4)), max_size=6))
def test_what_others_have_cached_changes_nothing_that_a_client_is_told(others):
    """Whether, when, how much and in which order others cached the same text: one answer."""

    def told(neighbours):
        world = World()
        world.donate(space("acme"), 1)
        for name, seed in neighbours:
            world.donate(space(name), seed, lead=60 + seed)
        return [
            {k: v for k, v in world.ask("acme", prompt(*seeds))[1].to_json().items() if not k.endswith("_s")}
            for seeds in ((1,), (2,), (1, 3), (4, 2))
        ]

    assert told(others) == told([])


def test_a_hit_on_a_trusted_conversation_is_in_no_number_the_client_gets(world):
    cold = world.ask("initech", prompt(1))[1].to_json()
    world.donate(space("globex"), 1)
    true, told = world.ask("initech", prompt(1))
    assert true.reused == 600 and true.outcome is Outcome.REUSED
    assert told.to_json() == cold
    world.donate(LIBRARY, 2)
    assert world.ask("acme", prompt(2))[1].reused == 600, "the group's own library is no secret to it"


@pytest.mark.parametrize("mode", ["on", "discover"])
@pytest.mark.parametrize("asked", [(2,), (1, 2), (2, 1), (1,), (3, 2, 1)])
def test_ones_own_text_beside_a_trusted_members_is_no_oracle(mode, asked):
    """Own donor 1; whether or not a trusted member has 2, one answer, which counts what is one's own."""

    def told(member_has: bool):
        world = World(mode=mode)
        world.donate(space("initech"), 1)
        world.donate(namespace(name_of(MARK, DOCUMENTS, "team")), 3)
        if member_has:
            world.donate(space("globex"), 2)
            world.donate(space("globex"), 1, 2, lead=51)  # a better donor of the own text, too
        true, told = world.ask("initech", prompt(*asked))
        return true, told.to_json()

    true, warm = told(True)
    _, cold = told(False)
    assert warm == cold
    own = 600 * sum(seed != 2 for seed in asked)
    assert (warm["reused"], warm["discovered"]) == ((own, 0) if mode == "on" else (0, own))
    assert true.reused + true.discovered == 600 * len(asked), "the control: it was borrowed"


def page(world: World, name: str, tokens: np.ndarray) -> dict:
    """What the page of a request that was just admitted lists."""
    stamp = stamp_of(TENANTS.tenants[name], TENANTS, MARK, 0)
    view = RequestView("r", space(name), tokens, 0, len(tokens), {}, lenders_of(stamp, space(name)))
    session = world.pipeline.admit(view, "r", len(tokens), 0, stamp)
    world.pipeline.withdraw(session)
    return explain.details(session, space(name), world.pipeline.index)


def test_a_page_tells_no_more_of_a_trusted_hit_than_the_report(world):
    cold = page(world, "initech", prompt(1))
    world.donate(space("globex"), 1)
    assert page(world, "initech", prompt(1)) == cold and [run["origin"] for run in cold["runs"]] == ["fresh"]
    world.donate(LIBRARY, 2)
    (lender,) = page(world, "acme", prompt(2))["runs"][1]["donors"]
    assert set(lender) == {"foreign"}, "a document is lent, and the request that computed it is not named"


@pytest.mark.parametrize("mode", ["on", "discover"])
def test_a_page_lists_the_runs_that_its_report_counts(mode):
    world = World(mode=mode)
    world.donate(space("initech"), 1)
    cold = page(world, "initech", prompt(1, 2))
    world.donate(space("globex"), 1, 2, lead=51)
    told = world.ask("initech", prompt(1, 2))[1]
    assert page(world, "initech", prompt(1, 2)) == cold
    assert sum(run["length"] for run in cold["runs"] if run["origin"] == "reused") == told.reused
    assert told.reused == (600 if mode == "on" else 0)
    assert (told.expected_s > 0, told.saved_s) == (mode == "on", told.expected_s), "the plan that is told, not what ran"


# ---- what operators are told ----


class Told:
    """The metrics of a pipeline, written down."""

    audits = None

    def __init__(self):
        self.reports, self.kinds = [], []

    def record(self, report, tenant):
        self.reports.append(report)

    def borrowed(self, kinds):
        self.kinds.append({kind: tokens for kind, tokens in kinds.items() if tokens})

    def indexed(self, seconds):
        pass

    def observe(self, index, tree):
        pass


def test_metrics_know_whose_donors_stood_in_and_what_clients_are_not_told():
    world = World(strategy="epic")
    world.pipeline.metrics = told = Told()
    world.donate(LIBRARY, 1)
    world.donate(space("initech"), 2)
    world.donate(space("globex"), 3)
    world.ask("globex", prompt(1, 2, 3))
    world.ask("globex", prompt(4))
    world.ask("globex", prompt(1), upto=310)
    assert told.kinds == [{"own": 600, "document": 600, "trusted": 600}, {"document": 300}], "an aborted one read half"
    assert [report.reused for report in told.reports] == [1800, 0, 600]


def test_documents_of_the_server_count_as_nobodys_requests():
    world = World()
    world.pipeline.metrics = told = Told()
    world.send_document("a", text(1))
    assert told.reports == [] and world.ask("acme", prompt(1))[0].reused == 600 and len(told.reports) == 1


def test_labels_name_tenants_as_the_file_does():
    assert [one.owner for one in (space("acme"), space("acme", "salt"), LIBRARY, Namespace("x"))] == [
        *("acme", "acme", "documents:handbook", "x"),
    ]


def test_a_report_names_nobody(world):
    world.donate(LIBRARY, 1)
    told = json.dumps(world.ask("acme", prompt(1))[1].to_json())
    assert not any(name in told for name in ("acme", "globex", "handbook", "kvshare7"))


def test_the_order_of_the_queue_asks_the_own_namespace_only(world):
    world.donate(LIBRARY, 1)
    world.donate(space("globex"), 2)
    index = world.pipeline.index
    hashes, _ = index.fingerprints(np.concatenate((text(1), text(2))), 1)
    assert any(index.known(LIBRARY, hashes)) and not any(index.known(space("initech"), hashes))


# ---- the record ----


def test_the_record_says_who_what_from_whom_and_why_and_nothing_else(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "borrowed.jsonl"
    world = World(BorrowLog(str(path), clock=lambda: 12.5))
    world.donate(LIBRARY, 1)
    world.donate(space("initech"), 2)
    world.donate(space("globex", "secret salt"), 3)
    world.ask("globex", prompt(1, 2), rid="a prompt in an id")
    world.ask("globex", prompt(3), salt="secret salt")
    world.ask("acme", prompt(4))
    lines = path.read_text().splitlines()
    assert len(lines) == 1, "own and ordinary requests borrow from nobody"
    line = json.loads(lines[0])
    assert line["time"] == 12.5 and line["tenant"] == "globex"
    assert line["borrowed"] == [
        {"from": "documents:handbook", "rule": "document", "group": "handbook", "tokens": 600},
        {"from": "initech", "rule": "trusted", "group": "team", "tokens": 600},
    ]
    everything = lines[0] + caplog.text
    tokens = (str(i) for i in (*text(1)[:50], *text(2)[:50]))
    for secret in ("secret", "a prompt", within(None, "secret salt"), LIBRARY.extra_key, *tokens):
        assert secret not in everything


@pytest.mark.parametrize(
    ("upto", "fails", "lent"),
    [(1250, False, [1200]), (310, False, [300]), (310, True, [300]), (0, True, []), (0, False, [])],
)
def test_only_what_ran_is_recorded_as_borrowed(tmp_path, upto, fails, lent):
    path = tmp_path / "borrowed.jsonl"
    world = World(BorrowLog(str(path)))
    world.donate(LIBRARY, 1)
    world.donate(LIBRARY, 2)
    world.ask("acme", prompt(1, 2), upto=upto, fails=fails)
    found = [json.loads(line)["borrowed"][0]["tokens"] for line in path.read_text().splitlines()]
    assert found == lent


def test_the_record_names_the_version_of_a_document(tmp_path):
    path = tmp_path / "borrowed.jsonl"
    world = World(BorrowLog(str(path)))
    for seed in (1, 2, 3):
        world.send_document(f"id{seed}", text(seed))
    world.ask("acme", prompt(2, 1))
    world.send_document("id1", np.arange(1, 3), forget=True)
    world.send_document("id1 again", text(1))
    world.ask("acme", prompt(1))
    found = [json.loads(line)["borrowed"][0]["documents"] for line in path.read_text().splitlines()]
    assert found == [["id1", "id2"], ["id1 again"]]


def test_without_a_file_the_record_goes_to_the_servers_log(caplog):
    caplog.set_level(logging.INFO)
    world = World(BorrowLog(""))
    world.donate(LIBRARY, 1)
    world.ask("acme", prompt(1))
    assert '"tenant": "acme"' in caplog.text and "kvshare: borrowed" in caplog.text


def test_a_record_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    log = BorrowLog(str(tmp_path / "log"))
    log._file.close()
    world = World(log)
    world.donate(LIBRARY, 1)
    assert world.ask("acme", prompt(1))[0].reused == 600
    assert "could not be written" in caplog.text


# ---- quotas ----


def test_a_flood_leaves_what_is_guaranteed_and_takes_the_rest():
    world = World(index_tokens=2000)
    stamp = stamp_of(TENANTS.tenants["acme"], TENANTS, MARK, 0)
    world.desk.learn(Stamp("acme", guaranteed=1300), world.tree)
    world.donate(space("acme"), 1)
    world.donate(space("acme"), 2)
    world.donate(space("globex"), 3)
    for seed in range(4, 20):
        world.donate(space("hooli"), seed)
    world.pipeline.index._check()
    assert world.pipeline.index.owned["acme"] == 1210 and world.pipeline.index.owned["globex"] == 0
    held = Stamp(stamp.tenant, stamp.lenders, guaranteed=1300)
    assert world.ask("acme", prompt(1), stamp=held)[0].reused == 600
    assert world.ask("globex", prompt(3))[0].reused == 0


def test_without_a_guarantee_the_flood_pushes_everything_out():
    """The control of the test above."""
    world = World(index_tokens=2000)
    world.donate(space("acme"), 1)
    for seed in range(4, 20):
        world.donate(space("hooli"), seed)
    assert world.pipeline.index.owned["acme"] == 0


def test_nobody_with_a_guarantee_of_its_own_pushes_out_what_is_guaranteed_to_another():
    """Neither could lose a donor and still have as many tokens as it may count on."""
    world = World(index_tokens=1700)
    world.desk.learn(Stamp("acme", guaranteed=700), world.tree)
    world.desk.learn(Stamp("globex", guaranteed=1000), world.tree)
    world.donate(space("acme"), 1)
    for seed in range(2, 9):
        world.donate(space("globex"), seed)
    assert dict(world.pipeline.index.owned) == {"acme": 605, "globex": 605}
    assert world.ask("globex", prompt(8))[0].reused == 600, "its newest"


def test_a_tenant_keeps_no_more_than_its_limit_and_loses_its_own_oldest(world):
    world.desk.learn(Stamp("acme", donor_tokens=1300), world.tree)
    world.donate(space("globex"), 9)
    for seed in (1, 2, 3):
        world.donate(space("acme", "s" if seed == 2 else None), seed)
    owned = world.pipeline.index.owned
    assert owned["acme"] == 1210 and owned["globex"] == 605, "salts of one tenant share its limit"
    world.desk.learn(Stamp("acme", donor_tokens=0), world.tree)
    world.donate(space("acme"), 4)
    assert owned["acme"] == 0


def test_however_many_leave_at_once_each_donor_is_looked_at_a_few_times(monkeypatch):
    """A walk over the whole index for each that leaves would let one tenant stop the scheduler for everybody."""
    looks = Counter()

    def look(donor, name):
        looks["donor"] += 1
        return object.__getattribute__(donor, name)

    class Counted(Namespace):
        def __eq__(self, other):
            looks["namespace"] += 1
            return super().__eq__(other)

        __hash__ = Namespace.__hash__

    def looked(capacity: int, others: int) -> tuple[int, int]:
        index = SegmentIndex(window=16, min_run=32, capacity=capacity, limits={"acme": DonorLimits(most=3200)})
        for number in range(others):
            index.add(Counted(space("globex").extra_key, owner="globex"), np.arange(40) + 100 * number)
        for number in range(80):  # each in a namespace of its own, as salts make them
            index.add(Counted(space("acme").extra_key, f"salt {number}", owner="acme"), np.arange(40) + 100 * number)
        looks.clear()
        index.add(Counted(space("acme").extra_key, owner="acme"), np.arange(3200))
        total, left = looks.total(), sum(index.left.values())
        index._check()
        assert left >= 80 and index.owned["acme"] == 3200
        return total, left

    monkeypatch.setattr(Donor, "__getattribute__", look)
    for capacity in (10**6, 8000):
        total, left = looked(capacity, others=200)
        assert total < 50 * left
    assert looked(10**6, others=2000) == looked(10**6, others=20), "who stays is not looked at"


def greedy(index, length: int = 300) -> np.ndarray:
    """Ids chosen for it, as anybody can choose them who has read `hashing`: the next window's hash is ever larger, so
    every window is the least of those behind it and all are kept."""
    tokens, window = list(range(index.window)), index.window
    last = window_hashes(np.array(tokens), window)[0]
    while len(tokens) < length:
        tries = np.tile(np.array([*tokens[1 - window :], 0]), (512, 1))
        tries[:, -1] = np.arange(512)
        hashes = window_hashes(tries.ravel(), window)[::window]
        larger = np.flatnonzero(hashes > last)
        chosen = larger[hashes[larger].argmin()] if len(larger) else hashes.argmin()
        last = hashes[chosen]
        tokens.append(int(chosen))
    return np.array(tokens)


def test_a_tenant_has_no_more_entries_than_its_limit_however_it_chooses_its_text(world):
    index, desk = world.pipeline.index, world.desk
    world.donate(space("globex"), 9)
    usual = index.entered["globex"] / 605
    world.pipeline.publish("control", space("hooli"), greedy(index))
    assert index.entered["hooli"] > 3 * usual * 300, "the control: tokens do not bound entries well"
    desk.learn(Stamp("acme", index_entries=100), world.tree)
    for seed in (1, 2):
        world.donate(space("acme"), seed)
    assert index.owned["acme"] == 605 and 0 < index.entered["acme"] <= 100, "its oldest has left"
    world.pipeline.publish("too many at once", space("acme", "s"), greedy(index))
    assert index.entered["acme"] <= 100 and index.owned["globex"] == 605
    assert index.left["quota"] >= 2


def test_guaranteed_donors_are_pinned_as_they_grow_and_let_go_after(world):
    world.desk.learn(Stamp("acme", guaranteed=700), world.tree)
    index, tree = world.pipeline.index, world.tree
    world.pipeline.publish("r", space("acme"), text(1)[:300])
    world.pipeline.publish("r", space("acme"), text(1))
    assert list(tree.held.values()) == [1] and world.desk.held_tokens == 600
    first = next(iter(tree.held))
    world.donate(space("acme"), 2)  # 605 tokens: the newest is pinned, the older one does not fit beside it
    assert first not in tree.held and list(tree.held.values()) == [1] and world.desk.held_tokens == 605
    world.desk.learn(Stamp("acme", guaranteed=0), world.tree)
    world.donate(space("acme"), 3)
    assert not tree.held and world.desk.held_tokens == 0 and len(index.donors) == 3


def test_pins_give_way_and_come_back(world):
    world.desk.learn(Stamp("acme", guaranteed=1300), world.tree)
    world.donate(space("acme"), 1)
    world.desk.let_go(world.tree)
    assert not world.tree.held and world.desk.held_tokens == 0
    world.donate(space("acme"), 2)
    assert len(world.tree.held) == 2


def test_other_promises_end_those_of_before_and_old_requests_renew_none(world):
    """As a tenant that was taken out of the file: it sends nothing that would give its pins back."""
    world.desk.learn(Stamp("acme", guaranteed=700), world.tree)
    world.donate(space("acme"), 1)
    world.desk.learn(Stamp("hooli"), world.tree)
    assert world.desk.held_tokens == 605, "the control: the same promises"
    world.desk.learn(Stamp("hooli", guaranteed=700, revision=1), world.tree)
    assert not world.tree.held and set(world.desk.limits) == {"hooli"}
    world.desk.learn(Stamp("acme", guaranteed=700), world.tree)
    world.donate(space("acme"), 2)
    world.donate(space("hooli"), 3)
    assert world.desk.held_tokens == 605 and set(world.desk.limits) == {"hooli"}


def test_nothing_is_pinned_for_who_has_no_guarantee(world):
    world.donate(space("hooli"), 1)
    assert not world.tree.held and "hold" not in world.tree.calls


def test_a_flush_forgets_the_pins_with_the_tree(world):
    world.desk.learn(Stamp("acme", guaranteed=700), world.tree)
    world.donate(space("acme"), 1)
    world.tree.held.clear()  # the tree is new
    world.pipeline.flush()
    assert world.desk.held_tokens == 0
    world.donate(space("acme"), 1)
    assert list(world.tree.held.values()) == [1]


@given(st.lists(st.integers(0, 50), max_size=10), st.integers(0, 100))
def test_pins_stay_within_the_guarantee(lengths, guaranteed):
    held = to_hold(enumerate(lengths), guaranteed)
    assert sum(lengths[i] for i in held) <= guaranteed
    assert not lengths or not 0 < lengths[0] <= guaranteed or next(iter(held)) == 0, "the most recent first"


@pytest.mark.parametrize("bad", ["acme", "globex"])
def test_a_borrowers_bad_audits_shut_a_document_for_it_alone(bad):
    """Whoever writes prompts in which a document does harm must not take it from its group."""
    world = World(audit_share=1.0)
    world.donate(LIBRARY, 1)
    auditor = world.pipeline.auditor
    for n in range(3):
        world.ask(bad, prompt(1), rid=f"bad{n}")
        if capture := world.capture:
            auditor._learn(capture, SimpleNamespace(kl=2.0, tokens=1, same=1.0, same_first=1))
    other = {"acme": "globex", "globex": "acme"}[bad]
    assert world.ask(bad, prompt(1))[0].reused == 0
    assert world.ask(other, prompt(1))[0].reused == 600
    assert auditor.controller.is_off(bad) is False, "the donor is shut, not the tenant"


def test_ones_own_harmful_donor_is_shut_for_good():
    """The control of the test above."""
    world = World(audit_share=1.0)
    world.donate(space("acme"), 1)
    auditor = world.pipeline.auditor
    for n in range(3):
        world.ask("acme", prompt(1), rid=f"bad{n}")
        if capture := world.capture:
            auditor._learn(capture, SimpleNamespace(kl=2.0, tokens=1, same=1.0, same_first=1))
    assert not world.pipeline.index.donors and world.ask("acme", prompt(1))[0].reused == 0


# ---- the library's own requests ----


def test_a_document_is_lent_pinned_and_forgotten(world):
    world.send_document("manual/1", text(1))
    assert world.ask("acme", prompt(1))[0].reused == 600 and world.desk.held_tokens == 600
    world.send_document("manual/1", text(1))  # again, as after an eviction: nothing changes
    assert list(world.tree.held.values()) == [1]
    world.send_document("manual/1", np.arange(1, 3), forget=True)
    assert world.ask("acme", prompt(1))[0].reused == 0 and not world.tree.held


def test_forgetting_what_is_not_there_is_harmless(world):
    world.send_document("none", np.arange(1, 3), forget=True)
    assert not world.tree.held


# ---- what the scheduler believes ----


def test_a_stamp_counts_only_where_a_tenants_file_is_in_force():
    """Without one, clients write `custom_params` themselves."""
    from kvshare_sched.engine.sglang.requests import stamp_of as stamp_in

    stamp = stamp_of(TENANTS.tenants["acme"], TENANTS, MARK, 0)
    params = {"kvshare_tenant": stamp.to_text()}
    req = SimpleNamespace(rid="r", sampling_params=SimpleNamespace(custom_params=params))
    assert stamp_in(req, KVShareConfig(tenants_file="f")) == stamp
    assert stamp_in(req, KVShareConfig()) is None
    for other in (None, {}, {"kvshare_tenant": "{"}, {"kvshare_tenant": 3}, {"kvshare_tenant": '{"lenders": []}'}):
        req.sampling_params.custom_params = other
        assert stamp_in(req, KVShareConfig(tenants_file="f")) is None


# ---- weight and quality ----


def test_weight_and_target_come_with_the_request(world):
    from kvshare_sched.scheduling.fairness import Accounts

    world.ask("acme", prompt(1), stamp=Stamp("acme", target_kl=0.5))
    assert world.pipeline.auditor.controller.target_of("acme") == 0.5
    assert world.pipeline.auditor.controller.target_of("hooli") == KVShareConfig().target_kl
    accounts = Accounts(100.0, unknown=1)
    accounts.enter("acme")
    accounts.weigh("acme", 3.0)
    assert accounts.grant("acme") == 300.0
    assert accounts.enter("someone else") == "someone else", "a known tenant takes no place of the unknown"
