"""What a request's body asked for, overwritten with what its sender is: the one place all endpoints go through.

SGLang turns every endpoint's body into a `GenerateReqInput` and hands it to the tokenizer manager; that object is
changed here. Works on its plain attributes and imports nothing of SGLang.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from kvshare_sched.tenants.file import Tenants
from kvshare_sched.tenants.identity import SERVER, Caller
from kvshare_sched.tenants.namespaces import TENANT, name_of, owner_of, within
from kvshare_sched.tenants.policy import STAMP_KEY, Stamp, stamp_of
from kvshare_sched.tenants.seal import SEAL_KEY, seal_of


def stamp_request(obj, caller: Caller, tenants: Tenants, mark: str, flight: int, *, sign: int = 0) -> None:
    """Give a request its tenant's namespace, priority and stamp. Raises ValueError for what tenants may not ask for.

    obj: a `GenerateReqInput` before SGLang has normalised it; extra_key, cache_salt and sampling_params may be lists,
    one entry a prompt. sign: 1 where large priorities come first, -1 where small ones do, 0 where none is looked at.
    """
    if obj.session_params:
        raise ValueError(
            "session_params are not available with tenants: a session can be continued by whoever names it"
        )
    obj.session_id = None  # names are the whole server's, so one could be another tenant's
    tenant = caller.tenant
    if tenant != SERVER:  # health checks have ids that the scheduler knows
        obj.rid = None  # a chosen one could meet another tenant's, and tell that it runs
    obj.cache_salt = _salts(obj)
    if not caller.known:  # may be anybody: shares with nobody, not with itself either
        many = isinstance(obj.cache_salt, list)
        obj.cache_salt = [secrets.token_hex(16) for _ in obj.cache_salt] if many else secrets.token_hex(16)
    obj.extra_key = extra_key = name_of(mark, TENANT, tenant.name)
    if isinstance(obj.cache_salt, list):
        obj.extra_key = [extra_key] * len(obj.cache_salt)
    obj.priority = _priority(obj.priority, tenant.priority, sign)
    _write(obj, stamp_of(tenant, tenants, mark, flight), extra_key)


def stamp_document(obj, extra_key: str, document: str, *, guaranteed: int, revision: int, forget: bool = False) -> None:
    """Make a request one of the server's own, that computes a document in a group's namespace, or drops it.

    guaranteed: tokens of documents that stay pinned; revision: of the promises in the tenants file.
    """
    obj.extra_key, obj.cache_salt = extra_key, None
    owner = owner_of(extra_key)
    stamp = Stamp(owner, document=document, guaranteed=guaranteed, forget=forget, revision=revision)
    _write(obj, stamp, extra_key, kvshare="off")


def _salts(obj):
    """One salt, or a list of them, for what the body says in extra_key and cache_salt."""
    keys, salts = obj.extra_key, obj.cache_salt
    if not isinstance(keys, list) and not isinstance(salts, list):
        return within(_text("extra_key", keys), _text("cache_salt", salts))
    count = len(keys if isinstance(keys, list) else salts)
    keys = keys if isinstance(keys, list) else [keys] * count
    salts = salts if isinstance(salts, list) else [salts] * count
    if len(keys) != len(salts):
        raise ValueError(f"extra_key has {len(keys)} entries and cache_salt {len(salts)}; send one for every prompt")
    found = [within(_text("extra_key", key), _text("cache_salt", salt)) for key, salt in zip(keys, salts, strict=True)]
    # SGLang accepts no None inside a list; the empty text means the same.
    return [salt or "" for salt in found]


def _text(name: str, value) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    return value


def _priority(asked: int | None, ceiling: int, sign: int) -> int | None:
    """The asked priority, 0 when none is, at most as urgent as the ceiling."""
    if asked is not None and type(asked) is not int:  # one path of SGLang checks no types, and NaN is below no ceiling
        raise ValueError("priority must be a whole number")
    return sign * min(sign * (asked or 0), sign * ceiling) if sign else asked


def _write(obj, stamp: Stamp, extra_key: str, **more: object) -> None:
    text = stamp.to_text()
    more[SEAL_KEY] = seal_of(text, extra_key)
    if isinstance(obj.sampling_params, list):
        if not obj.sampling_params:
            raise ValueError("sampling_params must have an entry for every prompt, or be one object")
        obj.sampling_params = [_stamped(params, text, more) for params in obj.sampling_params]
    else:
        obj.sampling_params = _stamped(obj.sampling_params, text, more)


def _stamped(params, text: str, more: Mapping[str, object]) -> dict:
    params = {} if params is None else params
    custom = params.get("custom_params") if isinstance(params, Mapping) else 0
    custom = {} if custom is None else custom
    if not isinstance(custom, Mapping):
        raise ValueError("sampling_params and its custom_params must be objects")
    if type(samples := params.get("n", 1)) is not int or samples < 1:
        raise ValueError("n in sampling_params must be a whole number from 1")
    if params.get("beam_width") not in (None, 1):
        raise ValueError("beam_width is not available with tenants: beams would run uncounted; ask for n answers")
    return {**params, "custom_params": {**custom, **more, STAMP_KEY: text}}


def requests_in(obj) -> int:
    """How many requests a body holds, samples of one prompt included; read before SGLang has normalised it."""
    params = obj.sampling_params
    first = params[0] if isinstance(params, list) and params else params
    samples = first.get("n", 1) if isinstance(first, Mapping) else 1
    prompts = 1
    if isinstance(obj.text, list):
        prompts = len(obj.text)
    elif isinstance(obj.input_ids, list) and obj.input_ids and isinstance(obj.input_ids[0], list):
        prompts = len(obj.input_ids)
    elif isinstance(obj.input_embeds, list) and obj.input_embeds and isinstance(obj.input_embeds[0], list):
        nested = obj.input_embeds[0]
        prompts = len(obj.input_embeds) if nested and isinstance(nested[0], list) else 1
    return max(1, prompts) * (samples if type(samples) is int and samples > 0 else 1)
