"""The scheduler's door: a request counts only with the seal of the process that talks HTTP.

SGLang merely logs a hook that it could not put in place. Were those of the HTTP process missing, bodies would choose
their namespace and write stamps themselves; so every stamp carries an HMAC over it and its namespace, with a secret of
this launch that the launcher leaves in the environment of its processes. Works on plain attributes, imports nothing of
SGLang.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import hmac
import logging
import os
import secrets

from kvshare_sched.tenants.namespaces import frame
from kvshare_sched.tenants.policy import STAMP_KEY

logger = logging.getLogger(__name__)
SECRET = "KVSHARE_STAMP_SECRET"  # environment variable
SEAL_KEY = "kvshare_seal"  # in custom_params
_ours: contextvars.ContextVar[bool] = contextvars.ContextVar("kvshare_ours", default=False)


def prepare() -> None:
    """In the launcher, before anything is spawned. Launchers of several nodes are given one secret by the operator."""
    os.environ.setdefault(SECRET, secrets.token_hex(32))


def seal_of(text: str, extra_key: str) -> str:
    """Hex HMAC of a stamp and the namespace it goes with."""
    secret = os.environ.get(SECRET, "")
    return hmac.new(
        secret.encode(), frame(text, extra_key).encode("utf-8", "surrogatepass"), hashlib.sha256
    ).hexdigest()


def sealed(params, extra_key: str | None) -> bool:
    """Whether these `custom_params` hold a stamp with its seal for this namespace. Without a secret nothing does."""
    params = params if isinstance(params, dict) else {}
    text, seal = params.get(STAMP_KEY), params.get(SEAL_KEY)
    if not os.environ.get(SECRET) or not all(isinstance(x, str) for x in (text, seal, extra_key)):
        return False
    return hmac.compare_digest(seal_of(text, extra_key).encode(), seal.encode("utf-8", "surrogatepass"))


@contextlib.contextmanager
def ours():
    """The scheduler hands itself a request of its own: an audit's reference."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def handle_generate_request(original, scheduler, recv_req, **more):
    """Around `Scheduler.handle_generate_request`: refuse what nobody has sealed, as every rank does alike."""
    params = recv_req.sampling_params
    if _ours.get() or sealed(params.custom_params, recv_req.extra_key):
        return original(scheduler, recv_req, **more)
    logger.error("kvshare: a request came past identification and is refused; see the log for hooks that failed")
    # SGLang ends such a request before any of its tokens is computed; nothing that it says of itself stays.
    recv_req.extra_key = recv_req.cache_salt = recv_req.session_id = recv_req.session_params = None
    params.custom_params = None
    return original(scheduler, recv_req, **{**more, "mm_input_error": "the sender of this request is not known"})
