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
    """Why a request ran as ordinary prefill, with a sentence for people; fixed values, they are metric labels."""

    def __new__(cls, value: str, sentence: str):
        reason = str.__new__(cls, value)
        reason._value_ = value
        reason.sentence = sentence
        return reason

    NONE = ("none", "reuse ran as planned")
    MODE_OFF = ("mode_off", "the server does not reuse: KVSHARE_MODE=off")
    OPTED_OUT = ("opted_out", "the request opted out")
    BAD_SETTING = (
        "bad_setting",
        "the request asks for a setting that does not exist or may not be set; the log names it",
    )
    SHORT = ("short", "too few tokens lie outside the exact prefix (KVSHARE_MIN_SUFFIX)")
    NO_MATCH = (
        "no_match",
        "no earlier prompt of this namespace holds a run of it (KVSHARE_MIN_RUN), or it has been evicted",
    )
    NOT_WORTH = ("not_worth", "copying and recomputing would have cost more than plain prefill, by the cost model")
    PROMPT_LOGPROBS = ("prompt_logprobs", "the client wants log-probabilities of the rows that could have been reused")
    UNSUPPORTED_INPUT = (
        "unsupported_input",
        "embeddings, images, hidden states, sessions and beam search take no part",
    )
    QUALITY = (
        "quality",
        "answers of this tenant missed the quality target; reuse is retried automatically after some more requests",
    )
    RETRACTED = ("retracted", "SGLang took its memory back once; it ran again as ordinary prefill")
    NO_MEMORY = ("no_memory", "with its donors pinned the request did not fit into the KV pool")
    PROMOTED = (
        "promoted",
        "computed again and again behind borrowed text, so this time exactly: the next ones find it",
    )
    DONOR_LOST = ("donor_lost", "the donors were evicted between matching and reading, or the weights were replaced")
    MIXED_INPUT = (
        "mixed_input",
        "another request of its batch brought embeddings, so all of the batch was computed in full",
    )
    ERROR = ("error", "an error in kvshare-sched; the rest ran as ordinary prefill, the log has the trace")
