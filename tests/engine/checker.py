"""What must be true of an engine after every pass, checked against the float64 reference and against SGLang's books.

Raises `Finding`, which says what was expected and what was found.
"""

from __future__ import annotations

import gc
import logging
from array import array
from collections import Counter
from collections.abc import Mapping

import invariants
import numpy as np
from bench import Bench, Ticket
from models import Reference

KV_TOLERANCE = 2e-3  # float32 against float64 through four layers: 1e-5 is usual; another context's KV is off by 0.1
LOGIT_TOLERANCE = 2e-3  # a greedy choice between logits closer than this may go either way
LOG_P_TOLERANCE = 2e-3


class Finding(AssertionError):
    """The engine broke a promise."""


class _Complaints(logging.Handler):
    """Our own log lines of unexpected failures, which the engine survives and nobody would see."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.found.append(f"{record.getMessage()} [{type(error).__name__}: {error}]")


class Checker:
    """Watches one engine. `flat`: reuse must be exact on its model, so every answer is compared."""

    def __init__(
        self, bench: Bench, reference: Reference, adapted: Mapping[str, Reference] | None = None, *, flat: bool
    ):
        """adapted: the reference under each adapter, by its `lora_id`."""
        self.bench, self.flat = bench, flat
        self.use(reference, adapted)
        self.injected = 0  # failures that the test has put into our steps
        self.tree_checked = self.answers_checked = 0
        self.stale = False  # the tree holds KV of weights that are gone
        self._done: set[int] = set()
        self._log = _Complaints()
        logging.getLogger("kvshare_sched").addHandler(self._log)
        logging.getLogger("radix_ext").addHandler(self._log)
        self._watch_passes()

    def use(self, reference: Reference, adapted: Mapping[str, Reference] | None = None) -> None:
        """The weights are these from now on."""
        self._references = {None: reference, **(adapted or {})}
        self._settled: dict[int, tuple[int, int]] = {}  # ticket -> what of it was compared in the tree: length, slots

    def truth(self, ticket: Ticket, tokens: list[int]):
        return self._references[ticket.sent.get("lora_id")](tokens)

    def close(self) -> None:
        self._undo()
        logging.getLogger("kvshare_sched").removeHandler(self._log)
        logging.getLogger("radix_ext").removeHandler(self._log)

    # ---- after each pass ----

    def after_pass(self) -> None:
        """Cheap: answers that have just ended, now and then what the tree holds of others, what a pass must keep."""
        for ticket in self.bench.tickets:
            if ticket.finished is not None and id(ticket) not in self._done:
                self._done.add(id(ticket))
                self._answer(ticket)
            elif ticket.finished is not None or self.bench.passes % 4:
                continue
            self._tree(ticket)
        self._complaints()

    def when_idle(self) -> None:
        """Dear: the whole tree, and every book must be closed."""
        self._settled.clear()
        for ticket in self.bench.tickets[-150:]:
            self._tree(ticket)
        self._books()
        self._complaints()

    def _fail(self, what: str):
        raise Finding(f"pass {self.bench.passes}: {what}")

    # ---- answers ----

    def _answer(self, ticket: Ticket) -> None:
        if ticket.aborted or ticket.sent.get("positional_embed_overrides") is not None:
            return
        asked, report = ticket.sent["tokens"], ticket.report
        if ticket.sent.get("ignore_eos", True) and len(ticket.output) != asked:
            self._fail(f"{ticket.rid} asked for {asked} tokens and got {len(ticket.output)}: {ticket.finished}")
        if report is None:
            self._fail(f"{ticket.rid} has no report")
        if ticket.sent.get("session_params") is None:
            counted = report["exact"] + report["reused"] + report["fresh"]
            if counted != len(ticket.prompt):
                self._fail(f"{ticket.rid} has {len(ticket.prompt)} prompt tokens, its report {counted}: {report}")
            if report["reason"] == "error" and not self.injected:
                self._fail(f"{ticket.rid} failed in our code: {report}")
            if self.flat or report["outcome"] != "reused":
                self._tokens(ticket)

    def _tokens(self, ticket: Ticket) -> None:
        """Each token is the likeliest after what stands before it, as the reference sees it."""
        if self.stale:
            return
        self.answers_checked += 1
        text, start = ticket.prompt + ticket.output, len(ticket.prompt)
        truth = self.truth(ticket, text)
        for at, token in enumerate(ticket.output):
            row = truth.logits[start + at - 1]
            if row.max() - row[token] > LOGIT_TOLERANCE:
                self._fail(
                    f"{ticket.rid} ({start} tokens) says {ticket.output}; token {at} should be {int(row.argmax())} "
                    f"(logit {row.max():.4f} against {row[token]:.4f}); {ticket.report}"
                )
        for at, found in enumerate(ticket.output_logprobs[: len(ticket.output)]):
            expected = truth.log_p[start + at - 1, ticket.output[at]]
            if abs(found - expected) > LOG_P_TOLERANCE:
                self._fail(f"{ticket.rid}: log p of output token {at} is {found:.5f}, should be {expected:.5f}")
        first = ticket.sent.get("logprob_start_len", -1)
        if ticket.input_logprobs and first >= 0:
            for at, found in enumerate(ticket.input_logprobs, first):
                if found is None or at == 0:
                    continue
                expected = truth.log_p[at - 1, ticket.prompt[at]]
                if abs(found - expected) > LOG_P_TOLERANCE:
                    self._fail(f"{ticket.rid}: log p of prompt token {at} is {found:.5f}, should be {expected:.5f}")

    # ---- the exact tree ----

    def _tree(self, ticket: Ticket) -> None:
        """Whatever the tree holds of a text is what the reference computes for it."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        sent = ticket.sent
        if self.stale or sent.get("session_params") or sent.get("positional_embed_overrides"):
            return
        # An answer enters the tree when it ends.
        cache, tokens = self.bench.cache, ticket.prompt + (ticket.output if ticket.finished is not None else [])
        name = (sent.get("extra_key") or "") + (sent.get("lora_id") or "") or None
        key = RadixKey(array("q", tokens), name, cache_salt=sent.get("cache_salt"))
        matched, node, _ = cache.tree_core.match_full_device_prefix(key)
        if not matched:
            return
        slots = cache.path_device_indices(node)[:matched].long()
        mark = (matched, hash(slots.numpy().tobytes()))
        if self._settled.get(id(ticket)) == mark:
            return
        self._settled[id(ticket)] = mark
        self.tree_checked += matched
        truth, pool = self.truth(ticket, tokens), self.bench.runner.token_to_kv_pool
        for name, expected, read in (("k", truth.k, pool.get_key_buffer), ("v", truth.v, pool.get_value_buffer)):
            for layer in range(len(expected)):
                off = np.abs(read(layer)[slots].numpy() - expected[layer, :matched]).max(axis=(1, 2))
                if off.max() > KV_TOLERANCE:
                    at = int((off > KV_TOLERANCE).argmax())
                    self._fail(
                        f"the exact tree is wrong: {ticket.rid}, {matched} of {len(tokens)} tokens matched, off by "
                        f"{off.max():.3g} from position {at} on (layer {layer}, {name}); {ticket.report}"
                    )

    # ---- books ----

    def _watch_passes(self) -> None:
        """Before memory is taken for a prefill pass, what our hooks lean on in SGLang's scheduler must hold."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        scheduler, prepare = self.bench.scheduler, ScheduleBatch.prepare_for_extend
        adders, make = [], scheduler.get_prefill_adder_class()
        scheduler.get_prefill_adder_class = lambda: (
            lambda *args, **more: adders.append(make(*args, **more)) or adders[-1]
        )

        def checked(batch) -> None:
            invariants.cut_prompts(batch)
            invariants.waiting_chunk(scheduler, batch)
            invariants.pieces(batch)
            invariants.budget(adders[-1])
            invariants.rows(batch, scheduler.chunked_prefill_size)
            invariants.memory(batch)
            adders.clear()
            prepare(batch)

        ScheduleBatch.prepare_for_extend = checked
        self._undo = lambda: setattr(ScheduleBatch, "prepare_for_extend", prepare)

    def _complaints(self) -> None:
        """Lines of our log that tell of a failure nobody has injected."""
        found, self._log.found = self._log.found, []
        if found and not self.injected:
            self._fail(f"our log: {found[0]}")

    def _books(self) -> None:
        """An idle engine owes nothing to anybody."""
        bench, pipeline, scheduler = self.bench, self.bench.pipeline, self.bench.scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        free, held = allocator.available_size(), bench.cache.full_evictable_size()
        sessions = bench.cache.session_held_tokens() if hasattr(bench.cache, "session_held_tokens") else 0
        guaranteed = pipeline.desk.held_tokens
        if free + held + sessions + guaranteed != allocator.size:
            self._fail(f"slots: {free} free, {held} evictable, {sessions} in sessions of {allocator.size}")
        rows = scheduler.req_to_token_pool
        if rows.available_size() != rows.size and not sessions:
            self._fail(f"request rows: {rows.available_size()} free of {rows.size}")
        counts: dict[str, object] = {"pins": pipeline.tree.active, "piece of an audit": pipeline.auditor.piece}
        if (queue := bench.queue) is not None:
            counts |= {
                "running in the queue": queue._running,
                "waiting in the queue": queue._waiting,
                "returning": queue._returning,
                "long prompt": queue._long,
                "waiting rows": len(queue.queue),
                "running rows": queue.queue.running,
                "prompts looked at": len(queue._peek._prompts) + len(queue._peek._new),
                "texts waited for": queue.queue.duplicates._running,
                "passes waited": queue.queue.duplicates._passes,
                "failures of the queue": 0 if self.injected else queue.failures,
            }
        if left := {name: value for name, value in counts.items() if value}:
            self._fail(f"left behind: {left}")
        pipeline.index._check()
        if open_tickets := [t.rid for t in bench.open_tickets]:
            self._fail(f"never answered: {open_tickets}")


def living(kind: type) -> Counter:
    """Objects of a class that are alive, by state; for leaks that no table shows."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, kind))
