"""What waiting requests would cost if they ran now, without touching tree, pool or plan.

Every prompt is fingerprinted once; when the index has changed, a bounded number of requests is looked at again in each
pass, so a long queue costs a pass no more than a short one. Only the requester's own namespace is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.scheduling.estimate import Estimate, Prices, estimate
from radix_ext.records import Namespace

_THINNING = 4  # one in so many of the index's fingerprints is kept: one in 36 tokens
_NEW_TOKENS = 32_768  # prompt tokens fingerprinted in one pass
_AGAIN = 64  # requests looked at again in one pass


@dataclass(slots=True)
class Prompt:
    """One waiting request as the index sees it."""

    rid: str
    namespace: Namespace
    prompt: int  # tokens
    key: object  # the tree's key of everything but the last token; `token_ids` holds all, int64
    reusable: bool  # takes part in reuse, neither opted out nor of a kind that cannot
    lends: bool = True  # its KV enters the tree
    prints: list[int] = field(default_factory=list)  # as the index has them
    texts: list[int] = field(default_factory=list)  # the same, with names of this namespace's own
    positions: list[int] = field(default_factory=list)
    seen: tuple | None = None  # what the last look found; None: never looked at
    generation: int = -1  # of the index, at the last look


class Peek:
    """The prompts of one engine's waiting requests."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._new: OrderedDict[str, Prompt] = OrderedDict()
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()  # the one whose last look is oldest first
        self._events = 0
        costs = pipeline.costs
        self.copy_price = costs.copy_s / (costs.cell_s * costs.layers)

    def add(self, prompt: Prompt) -> None:
        """A request starts to wait."""
        self._new[prompt.rid] = prompt

    def remove(self, rid: str) -> Prompt | None:
        """A request waits no longer; returns it when it was looked at."""
        self._events += 1
        self._new.pop(rid, None)
        return self._prompts.pop(rid, None)

    def updates(self):
        """Yield (rid, Estimate) of the requests that are looked at in this pass, new ones first."""
        left = _NEW_TOKENS
        while self._new and left > 0:
            rid, prompt = self._new.popitem(last=False)
            left -= prompt.prompt
            tokens = np.frombuffer(prompt.key.token_ids, np.int64)
            prompt.prints, prompt.positions = self._pipeline.index.fingerprints(tokens, _THINNING)
            mark = hash(prompt.namespace)  # who has the same text elsewhere must not make anybody wait here
            prompt.texts = [fingerprint ^ mark for fingerprint in prompt.prints]
            self._prompts[rid] = prompt
            yield rid, self._look(prompt)
        for _ in range(min(_AGAIN, len(self._prompts))):
            rid, prompt = next(iter(self._prompts.items()))
            if prompt.generation == self._generation():
                break  # and so are all behind it
            self._prompts.move_to_end(rid)
            if (found := self._look(prompt)) is not None:
                yield rid, found

    def missing(self, prompt: Prompt, until: int) -> list[int]:
        """Texts that end before position `until` and that no donor has yet."""
        known = self._pipeline.index.known(prompt.namespace, prompt.prints)
        places = zip(prompt.texts, prompt.positions, known, strict=True)
        window = self._pipeline.index.window
        return [text for text, at, there in places if at + window <= until and not there]

    def _generation(self) -> int:
        """Grows whenever a look might find something else. With reuse off the index is empty, so requests count."""
        return self._events if self._pipeline.config.mode == "off" else self._pipeline.index.generation

    def _look(self, prompt: Prompt) -> Estimate | None:
        """What is known now; None when nothing has changed. The tree is asked each time: it grows, and what it evicts
        stays in the index until a plan finds out. That its tenant's ratio has moved a little is news with the next one.
        """
        prompt.generation = self._generation()
        known = self._pipeline.index.known(prompt.namespace, prompt.prints)
        exact = self._pipeline.tree.prefix_len(prompt.key)
        auditor, config = self._pipeline.auditor, self._pipeline.config
        reuse = config.mode == "on" and prompt.reusable and not auditor.refuses(prompt.namespace)
        if prompt.seen == (seen := (exact, reuse, known)):
            return None
        prompt.seen = seen
        prices = Prices(
            reuse=reuse,
            recompute=auditor.settings(config, prompt.namespace).ratio,
            copy=self.copy_price,
            least=config.min_suffix,
            lends=prompt.lends,
        )
        return estimate(prompt.prompt, exact, prompt.texts, prompt.positions, known, prices)
