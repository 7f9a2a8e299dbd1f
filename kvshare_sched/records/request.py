"""What is known of a request before it runs, and how it may end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from kvshare_sched.errors import PlanError
from radix_ext.records import Namespace


@dataclass(frozen=True, slots=True)
class RequestView:
    """What the planner may know of a request."""

    rid: str
    namespace: Namespace
    token_ids: np.ndarray  # int64 [prompt_len]
    exact_len: int  # tokens whose KV the exact tree gives
    fresh_from: int  # rows from here on are wanted by the client (logits, log-probabilities): never reused
    wishes: Mapping[str, object] = field(default_factory=dict)  # settings the request asks for, by name
    lenders: tuple[Namespace, ...] = ()  # other namespaces that policy lets it borrow from

    @property
    def prompt_len(self) -> int:
        return len(self.token_ids)

    def __post_init__(self):
        if not (0 <= self.exact_len <= self.prompt_len and 0 <= self.fresh_from <= self.prompt_len):
            raise PlanError(
                f"request {self.rid}: exact_len={self.exact_len} and fresh_from={self.fresh_from} "
                f"must lie inside prompt_len={len(self.token_ids)}"
            )


class Outcome(StrEnum):
    """What became of a request's chance to reuse; fixed values, they are metric labels."""

    REUSED = "reused"  # approximate KV stood in for part of the prompt
    DISCOVERED = "discovered"  # mode `discover`: would have been reused
    ORDINARY = "ordinary"  # ran as stock SGLang runs it; `reason` says why


class Reason(StrEnum):
    """Why a request ran as ordinary prefill; fixed values, they are metric labels."""

    NONE = "none"  # outcome reused or discovered
    MODE_OFF = "mode_off"
    OPTED_OUT = "opted_out"
    BAD_SETTING = "bad_setting"  # the request asks for a setting that does not exist or may not be set
    SHORT = "short"  # too few tokens outside the exact prefix to be worth a lookup
    NO_MATCH = "no_match"
    NOT_WORTH = "not_worth"  # the cost model predicts no gain
    PROMPT_LOGPROBS = "prompt_logprobs"  # rows the client asks for cover everything that could be reused
    UNSUPPORTED_INPUT = "unsupported_input"  # embeddings, images, hidden states, sessions, beams
    QUALITY = "quality"  # reuse is off for this tenant until it holds its target
    RETRACTED = "retracted"  # re-admitted after a retraction
    NO_MEMORY = "no_memory"  # with its donors pinned the request does not fit
    PROMOTED = "promoted"  # computed exactly because it has been computed again and again behind borrowed text
    DONOR_LOST = "donor_lost"  # the donors left the tree between matching and leasing
    MIXED_INPUT = "mixed_input"  # another request of its batch brought embeddings for its tokens
    ERROR = "error"  # anything unexpected in our code
