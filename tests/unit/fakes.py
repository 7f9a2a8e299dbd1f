"""A stand-in for the live tree, which answers as `engine.sglang.tree.DonorTree` does; and sessions by name."""

import torch

from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import Session
from radix_ext.stores.base import DonorLease


class FakeTree:
    """Every indexed donor is wholly there, until `evict` says how much of it is left."""

    def __init__(self):
        self.active = 0
        self.touched: list[int] = []
        self.calls: list[str] = []  # verbs used, in order
        self._left: dict[int, int] = {}
        self.held: dict[int, int] = {}  # donor -> pins that are no leases
        self.exact: dict[bytes, int] = {}  # bytes of a prompt's token array -> tokens of it the tree has
        self.refuse_lease: set[int] = set()  # donors that vanish between match and lease
        self.fail_lease: set[int] = set()  # donors whose lease raises

    def evict(self, donor_id: int, left: int) -> None:
        self._left[donor_id] = left

    def live_len(self, donor) -> int:
        self.calls.append("live_len")
        return min(len(donor.tokens), self._left.get(donor.id, len(donor.tokens)))

    def prefix_len(self, key) -> int:
        self.calls.append("prefix_len")
        return self.exact.get(bytes(key.token_ids), 0)

    def lease(self, donor, length: int) -> DonorLease | None:
        self.calls.append("lease")
        if donor.id in self.fail_lease:
            raise RuntimeError("the tree broke")
        if donor.id in self.refuse_lease or self._left.get(donor.id, length) < length:
            return None
        self.active += 1
        return DonorLease(donor.id, 1000 * donor.id + torch.arange(length), node=donor.id)

    def hold(self, donor) -> int | None:
        if self.live_len(donor) < len(donor.tokens):
            return None
        self.held[donor.id] = self.held.get(donor.id, 0) + 1
        return donor.id

    def let_go(self, node: int) -> None:
        self.held[node] -= 1
        if not self.held[node]:
            del self.held[node]

    def release(self, lease: DonorLease) -> None:
        self.calls.append("release")
        if not lease.released:
            lease.released = True
            self.active -= 1

    def touch(self, donor) -> None:
        self.calls.append("touch")
        self.touched.append(donor.id)


class NamedPipeline(Pipeline):
    """A pipeline whose sessions tests call by name. The real one knows none: they hang on SGLang's requests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sessions: dict[str, Session] = {}  # begun
        self._ordinary: dict[str, Session] = {}  # published without

    def begin(self, session: Session) -> None:
        self.sessions[session.rid] = session
        super().begin(session)

    def publish(self, name: str, namespace, tokens) -> None:
        """A name not known yet is an ordinary request's, computed from nothing."""
        session = self.sessions.get(name) or self._ordinary.get(name)
        if session is None:
            prompt, why = len(tokens), Reason.NO_MATCH
            session = Session(name, prompt, 0, self.config, None, why, weights=self.weights, reported=True)
            self._ordinary[name] = session
        super().publish(session, namespace, tokens)

    def release(self, name: str, *args, **kwargs) -> None:
        """Names that nobody has are passed over."""
        self._ordinary.pop(name, None)
        if (session := self.sessions.pop(name, None)) is not None:
            super().release(session, *args, **kwargs)

    def exact_up_to(self, name: str, entered: int = 0) -> int:
        if name not in self.sessions:
            return 1 << 62
        return super().exact_up_to(self.sessions[name], entered)
