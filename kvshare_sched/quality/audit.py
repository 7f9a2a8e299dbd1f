"""Audits: a share of the approximate requests is prefilled again in full, off their answers' way, and compared.

    begun (chosen? capture) -> observe (rows of logits) -> finished (queue) -> start (engine idle) -> settle

The captured rows are the approximate model's own distributions at the first output positions; the reference is
ordinary prefill of prompt and sent tokens, piece by piece when the engine is idle: a prefill pass cannot be
interrupted, so a client that comes waits for one piece. Choices depend on shared state only, and rank 0's
measurement is every rank's, so all tensor-parallel ranks audit and conclude alike.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvshare_sched.quality.controller import Controller
from kvshare_sched.quality.divergence import Measurement, compare
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

logger = logging.getLogger(__name__)
POSITIONS = 24  # output tokens compared, from the first
TOP = 128  # ids of each captured distribution that are compared one by one
PIECE = 256  # tokens prefilled at a time; a multiple of all page sizes in use, so that every piece finds those before
_QUEUE = 64  # finished requests waiting for an idle engine
_TENANTS = 4096  # whose approximate requests are counted
Blamed = int | tuple[str, int]  # a donor; (borrower, donor) for one that another namespace lends


@dataclass(slots=True)
class Capture:
    """A running request chosen for audit."""

    tenant: str
    strategy: str
    ratio: float
    wished: bool  # the request brought its own settings: measured, but moves nothing
    donors: tuple[Blamed, ...]
    prompt_len: int
    exact_len: int  # of it, in the tree when the request came
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # ids int64, log p float32, [TOP]
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Audit:
    """A finished request whose reference is still to be computed."""

    rid: str
    namespace: Namespace
    tokens: Sequence[int]  # prompt, then the tokens sent (at most POSITIONS)
    capture: Capture

    @property
    def ids(self) -> list[int]:
        """Ids whose reference log-probabilities are needed, ascending."""
        return sorted({i for ids, _ in self.capture.rows for i in ids.tolist()})


class Auditor:
    """Chooses, captures, queues and settles audits of one engine; the controller learns from them."""

    def __init__(
        self,
        config: KVShareConfig,
        shut: Callable[[Blamed], None],
        metrics=None,
        lent: Callable[[int, str], bool] = lambda donor, tenant: False,
        prefill_s: Callable[[int], float] = lambda tokens: 0.0,
    ):
        """lent(donor, tenant): it is not the tenant's own. What it does in one borrower's prompts is then held against
        it for that borrower alone: a tenant that writes such prompts would else take a document from its whole group.
        prefill_s(tokens): what the cost model says a pass over so many tokens costs.
        """
        self.share, self.repair_rows = config.audit_share, config.repair_rows
        self.controller = Controller(config.ratio, config.target_kl)
        self.agree: Callable = lambda found: found  # rank 0's object on every rank
        self.queue: deque[Audit] = deque()
        self.running: Audit | None = None
        self.upto = 0  # of its tokens, with the piece that was last asked for
        self._done = 0  # of its tokens, in the tree
        self.piece: object | None = None  # SGLang's request for that piece, while the engine has it
        self.held_back: list = []  # what came while it ran and must find an idle engine, in order
        self.tokens = self.served = 0  # spent on audits; prompt tokens of clients
        self.started_s = 0.0  # by the clock, for the metrics only
        self._prefill_s = prefill_s
        self._shut, self._lent = shut, lent
        self._metrics = metrics
        self._counts: OrderedDict[str, int] = OrderedDict()  # approximate requests of each tenant

    # ---- settings of a request ----

    def settings(self, config: KVShareConfig, namespace: Namespace) -> KVShareConfig:
        """The configuration with the ratio its tenant has arrived at; a server told to recompute everything does."""
        ratio = self.controller.ratio(namespace.owner)
        return config if ratio == config.ratio or config.ratio >= 1 else config.for_request({"ratio": ratio})

    def refuses(self, namespace: Namespace) -> bool:
        """Reuse is off for this tenant."""
        return self.controller.is_off(namespace.owner)

    # ---- a client's request ----

    def begun(self, session) -> None:
        """A `session.Session` was admitted: decide whether to audit it."""
        if self.share == 0 or session.audit or session.reason is Reason.RETRACTED:
            return
        self.served += session.prompt_len
        if session.reason is Reason.QUALITY:
            tenant = session.namespace.owner
            self.controller.refused(tenant)
            self._show(tenant)
        if session.outcome is not Outcome.REUSED or not self._chosen(tenant := session.namespace.owner):
            return
        config = session.config
        # An answer repaired on the way says nothing about those that are not.
        wished = session.wished or config.repair_rows != self.repair_rows
        session.capture = Capture(
            *(tenant, config.strategy, config.ratio, wished),
            donors=tuple((tenant, d) if self._lent(d, tenant) else d for d in sorted(session.leases)),
            prompt_len=session.prompt_len,
            exact_len=session.exact_len,
        )

    def _chosen(self, tenant: str) -> bool:
        """A tenant's first approximate request, then every (1 / share)-th."""
        count = self._counts.pop(tenant, 0)
        self._counts[tenant] = count + 1
        if len(self._counts) > _TENANTS:
            self._counts.popitem(last=False)
        due = count == 0 or int(count * self.share) > int((count - 1) * self.share)
        return due or self.controller.on_trial(tenant)

    def observe(self, sessions, batch, output) -> None:
        """After a forward pass: keep the distributions of the requests under audit. Never raises.

        sessions: of the batch's requests, None for one without; batch: SGLang's ForwardBatch; output.next_token_logits
        float [requests, vocabulary], copied from at once because samplers write into it. Middle chunks of a prompt end
        before its length and are passed over.
        """
        for row, session in enumerate(sessions):
            capture = session.capture if session is not None else None
            if capture is None or capture.broken or len(capture.rows) >= POSITIONS:
                continue
            try:
                if int(batch.seq_lens_cpu[row]) - capture.prompt_len == len(capture.rows):
                    logits = output.next_token_logits[row].float()
                    best = logits.topk(min(TOP, len(logits)))
                    capture.rows.append((best.indices, best.values - logits.logsumexp(0)))
            except Exception:
                logger.exception("kvshare: the logits of request %s could not be kept for its audit", session.rid)
                capture.broken = True

    def drop(self, session, reason: str) -> None:
        """A request's answer will say nothing about reuse; no matter when it was not under audit."""
        if session.capture is not None:
            session.capture = None
            self._count("dropped", reason)

    def released(self, session, finished: bool) -> None:
        """A request gave its KV back. One that ended without a token is not heard of again."""
        capture = session.capture
        if not finished:
            self.drop(session, "retracted")
        elif capture is not None and not capture.rows and not capture.broken:
            self.drop(session, "no_answer")

    def finished(self, session, namespace: Namespace, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """A request under audit has ended; answer: the tokens sent."""
        capture, session.capture = session.capture, None
        count = min(len(answer), len(capture.rows))
        if count == 0 or len(prompt) != capture.prompt_len:
            self._count("failed", "capture") if capture.broken else self._count("dropped", "no_answer")
            return
        capture.rows = [(ids.cpu(), log_q.cpu()) for ids, log_q in capture.rows[:count]]
        if len(self.queue) >= _QUEUE:
            self._drop_one()
        # Nobody can guess the id: SGLang aborts every request whose id begins as a client says.
        tokens = [*prompt, *answer[:count]]
        self.queue.append(Audit(f"kvshare-audit-{uuid.uuid4().hex}", namespace, tokens, capture))

    def _drop_one(self) -> None:
        """The oldest of whoever has most: a tenant that floods the engine leaves the others their audits."""
        [(busiest, _)] = Counter(audit.capture.tenant for audit in self.queue).most_common(1)
        del self.queue[next(i for i, audit in enumerate(self.queue) if audit.capture.tenant == busiest)]
        self._count("dropped", "queue_full")

    # ---- the reference ----

    def start(self, room: int) -> Audit | None:
        """The engine is idle: the audit that should run up to `upto` now, or None. room: tokens the pool can take.

        Cost is bounded: an audit starts only while audits have spent at most `share` of the prompt tokens served.
        """
        if self.piece is not None:  # an idle engine has lost it: aborted before it ran
            self._end("dropped", "lost")
        if self.running is not None and len(self.running.tokens) >= room:
            self._end("dropped", "no_room")
        while self.running is None and self.queue and self.tokens <= self.share * self.served:
            audit = self.queue.popleft()
            if len(audit.tokens) >= room:
                self._count("dropped", "no_room")
                continue
            self.running, self._done = audit, audit.capture.exact_len // PIECE * PIECE  # that much was in the tree
            self._spent(len(audit.tokens))
        if self.running is not None:
            self.upto = self._done + PIECE
            if self.upto >= self.running.capture.prompt_len:  # what is compared comes in one piece
                self.upto = len(self.running.tokens)
        return self.running

    def sent(self, piece: object) -> None:
        """The engine has taken the piece that `start` asked for as this request."""
        self.piece = piece

    @property
    def partial(self) -> bool:
        """Whether more pieces follow the one that runs."""
        return self.upto < len(self.running.tokens)

    def withdrawn(self) -> None:
        """The piece was taken out of the queue before it ran; `start` asks for it again."""
        self.piece = None

    def went_on(self, computed: int) -> None:
        """A piece has run and computed so many tokens, with more to come."""
        self.piece, self._done = None, self.upto
        if computed > 2 * PIECE:  # the pool is too small to keep what earlier pieces have computed
            self._spent(computed - PIECE)
            self._end("dropped", "no_room")

    def _spent(self, tokens: int) -> None:
        self.tokens += tokens
        if self._metrics is not None:
            self._metrics.spent(tokens)

    def owns(self, req) -> bool:
        """Whether a request of SGLang's is the piece of a reference that runs now."""
        return req is not None and req is self.piece

    def forget(self, reason: str, concerned: Callable[[Audit], bool] = lambda audit: True) -> None:
        """Drop the audits that can no longer be compared; no piece of them is in the engine (`audit_adapter`)."""
        kept = [audit for audit in self.queue if not concerned(audit)]
        for _ in range(len(self.queue) - len(kept)):
            self._count("dropped", reason)
        self.queue = deque(kept)
        if self.running is not None and concerned(self.running):
            self._end("dropped", reason)

    def timed(self, now_s: float, tokens: int) -> None:
        """A piece has run and computed so many tokens; it shows how far the cost model can be trusted."""
        if self._metrics is not None:
            self._metrics.timed(max(0.0, now_s - self.started_s), self._prefill_s(max(0, tokens)))

    def settle(self, reference: Sequence[Sequence[float]] | None, best: Sequence[int] | None) -> None:
        """The reference has run: rows as `compare` takes them, None when it failed. Never raises."""
        audit, found = self.running, None
        try:
            if reference is not None:
                found = compare(audit.capture.rows, reference, audit.ids, best)
        except Exception:
            logger.exception("kvshare: audit %s could not be measured", audit.rid)
        found = self.agree(found)
        if found is None:
            self._end("failed", "reference")
            return
        self._learn(audit.capture, found)
        self._end("done", "none")

    def _learn(self, capture: Capture, found: Measurement) -> None:
        if self._metrics is not None:
            self._metrics.measured(capture.tenant, capture.strategy, found)
        if capture.wished:
            return
        self.controller.audited(capture.tenant, capture.ratio, found.kl)
        self._show(capture.tenant)
        for donor in self.controller.charge(capture.donors, found.kl):
            logger.warning("kvshare: donor %s does harm and is shut (last audit: KL %.4g nats)", donor, found.kl)
            self._shut(donor)
            if self._metrics is not None:
                self._metrics.shut()

    # ---- counting ----

    def _show(self, tenant: str) -> None:
        if self._metrics is not None:
            self._metrics.controlled(tenant, self.controller.ratio(tenant), self.controller.is_off(tenant))

    def _end(self, result: str, reason: str) -> None:
        self.running = self.piece = None
        self._count(result, reason)

    def _count(self, result: str, reason: str) -> None:
        if self._metrics is not None:
            self._metrics.ended(result, reason)
