"""SGLang's requests, read: what the planner may know of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.promotion import ANSWER
from kvshare_sched.reuse.session import Rids
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.namespaces import namespace
from kvshare_sched.tenants.policy import Stamp, read
from kvshare_sched.tenants.scheduler_state import lenders_of
from radix_ext.records import Namespace

logger = logging.getLogger(__name__)
REPORT_KEY = "kvshare"  # in customized_info, meta_info and custom_params


def namespace_of(req) -> Namespace:
    """The boundary SGLang's own tree keeps for this request.

    SGLang has appended the adapter's id to its extra_key; here it stands for itself, so that owners can be read.
    """
    key = (req.extra_key or "").removesuffix(req.lora_id or "")
    return namespace(key, req.cache_salt, req.lora_id)


def tokens_of(req) -> np.ndarray:
    """Prompt and output ids so far, int64. A copy: a view would forbid SGLang to append to its array."""
    return np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).copy()


def said_of(req) -> np.ndarray | None:
    """Prompt and the beginning of the answer, int64; None without an answer."""
    if not req.output_ids:
        return None
    return np.concatenate((np.frombuffer(req.origin_input_ids, np.int64), np.array(req.output_ids[:ANSWER], np.int64)))


def takes_part(req) -> bool:
    """Whether a request is of a kind that can reuse: its prompt is its tokens, and its KV is all that is wanted."""
    return not (
        req.input_embeds is not None
        or req.multimodal_inputs is not None
        or req.positional_embed_overrides is not None
        or req.session is not None
        or req.return_hidden_states
        or req.return_pooled_hidden_states
        or req.skip_radix_cache_insert
        or req.beam_group is not None  # its output ids hold places, not what was answered
    )


def init_forward_batch(original, cls, batch, *args, **kwargs):
    """Around `ForwardBatch.init_new`: a batch knows its requests; SGLang's knows their ids alone."""
    made = original(cls, batch, *args, **kwargs)
    made.rids = Rids(batch.reqs)
    return made


def is_probe(req) -> bool:
    """Whether it is SGLang's health check; a client that borrows the name hides a prompt of one token, no more."""
    from sglang.srt.managers.utils import is_health_check_generate_req

    return len(req.origin_input_ids) == 1 and is_health_check_generate_req(req)


def stamp_of(req, config: KVShareConfig) -> Stamp | None:
    """What the HTTP process wrote about a request's tenant, which the gate has checked. Without a tenants file clients
    could write it themselves, so it counts for nothing then. Never raises."""
    if not config.tenants_file:
        return None
    try:
        return read(req.sampling_params.custom_params)
    except Exception:
        logger.exception("kvshare: request %s has no readable stamp; it borrows nothing", req.rid)
        return None


def view_of(req, stamp: Stamp | None = None) -> RequestView | Reason:
    """What the planner may know of a request, or why it cannot take part. Never raises."""
    try:
        return _view_of(req, stamp)
    except Exception:
        logger.exception("kvshare: request %s could not be read; ordinary prefill", req.rid)
        return Reason.ERROR


def _view_of(req, stamp: Stamp | None) -> RequestView | Reason:
    params = req.sampling_params.custom_params or {}
    wishes = params.get(REPORT_KEY) or {}
    if req.retracted_stain or len(req.output_ids) > 0:  # first: whatever it asks for, its tokens have been counted
        return Reason.RETRACTED
    if wishes == "off":
        return Reason.OPTED_OUT
    if not isinstance(wishes, Mapping):
        return Reason.BAD_SETTING
    if not takes_part(req):
        return Reason.UNSUPPORTED_INPUT
    tokens = tokens_of(req)
    fresh_from = len(tokens)
    if req.return_logprob and req.logprob_start_len >= 0:
        # The row before the first wanted token predicts it.
        fresh_from = min(fresh_from, max(req.prefix_len, req.logprob_start_len - 1))
    namespace = namespace_of(req)
    return RequestView(req.rid, namespace, tokens, req.prefix_len, fresh_from, wishes, lenders_of(stamp, namespace))
