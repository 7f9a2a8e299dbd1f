"""Pages about requests and the live state, in the process that talks HTTP.

    GET /kvshare/                  the live state and the latest requests; for admins (whoever may flush the cache)
    GET /kvshare/?rid=...          one request; for admins
    GET /kvshare/requests/{rid}    one request; for its own tenant, which names its namespace in two headers, and admins

With a tenants file keys decide instead: operators are the admins, and a tenant is who its key says it is.

HTML for browsers, JSON for everybody else (by the Accept header). What is known comes with the answers
(`client_report`) and from the metrics of all processes, so nothing has to be asked of the scheduler.
"""

from __future__ import annotations

import json
import os
from urllib.parse import urlencode

from kvshare_sched.observe import explain, recent_requests, render, server_state
from kvshare_sched.tenants.identity import Caller
from kvshare_sched.tenants.middleware import caller_here
from kvshare_sched.tenants.namespaces import owner_of

LISTED = 30  # latest requests on the live page
_REFRESH_S = 5
EXTRA_KEY, CACHE_SALT = "x-kvshare-extra-key", "x-kvshare-cache-salt"  # how a tenant says who it is
HEADERS = {"cache-control": "no-store", "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def may_see(record: dict, *, admin: bool, caller: Caller | None, extra_key: str, cache_salt: str) -> bool:
    """Whether somebody may read about a request: an admin; with a tenants file (`caller`) its tenant, whatever salt the
    request had; without one whoever knows the whole namespace it ran in."""
    details = record["details"]
    if admin or caller is None:
        return admin or (extra_key, cache_salt) == (details["extra_key"], details["cache_salt"])
    return caller.known and caller.tenant.name == owner_of(details["extra_key"])


def request_page(record: dict) -> str:
    """One request as HTML."""
    body = render.html_bar(record["details"]["runs"]) + render.html_tables(explain.sections(record))
    return render.html_page(f"Request {record['rid']}", body)


def live_page(state: server_state.State, latest: list[dict]) -> str:
    """The live state as HTML; it refreshes itself."""
    links = [
        (f"?{urlencode({'rid': r['rid']}, errors='replace')}", f"{r['rid']}: {_line(r['report'])}") for r in latest
    ]
    body = render.html_tables(server_state.sections(state)) + render.html_links("Latest requests", links)
    return render.html_page("kvshare", body, refresh_s=_REFRESH_S)


def _line(report: dict) -> str:
    counts = ", ".join(f"{report[o]} {o}" for o in ("exact", "reused", "fresh"))
    return f"{report['outcome']} ({report['reason']}); {counts}"


# ---- HTTP ----


def _html(text: str):
    from starlette.responses import HTMLResponse

    return HTMLResponse(text.encode(errors="replace"), headers=HEADERS)  # ids of clients may be no Unicode


def _json(value: dict, status: int = 200):
    from starlette.responses import Response

    return Response(json.dumps(value), status, HEADERS, "application/json")


def _wants_html(request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _is_admin(request) -> bool:
    """An operator of the tenants file; without one whoever SGLang lets call its own endpoints for admins: everybody,
    when it has no keys."""
    if (caller := caller_here.get()) is not None:
        return caller.operator
    from sglang.srt.runtime_context import get_serving
    from sglang.srt.utils.auth import AuthLevel, decide_request_auth

    keys = get_serving()
    return decide_request_auth(
        method="GET",
        path=request.url.path,
        authorization_header=request.headers.get("authorization"),
        api_key=keys.api_key,
        admin_api_key=keys.admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL,
    ).allowed


def _request(request):
    return _one(request, request.path_params["rid"])


def _one(request, rid: str):
    who = {"extra_key": request.headers.get(EXTRA_KEY, ""), "cache_salt": request.headers.get(CACHE_SALT, "")}
    who |= {"admin": _is_admin(request), "caller": caller_here.get()}
    record = next((found for found in recent_requests.requests.find(rid) if may_see(found, **who)), None)
    if record is None:
        kept = f"only the latest {recent_requests.EACH} requests of a tenant are kept, and shown to it and to admins"
        return _json({"error": f"not known: {kept}"}, 404)  # the same for both, or it would tell who has sent what
    return _html(request_page(record)) if _wants_html(request) else _json(record)


def _live(request):
    if not _is_admin(request):
        return _json({"error": "for admins"}, 401)
    if "rid" in request.query_params:
        return _one(request, request.query_params["rid"])
    state = server_state.State(_own_samples())
    if _wants_html(request):
        return _html(live_page(state, recent_requests.requests.latest(LISTED)))
    tables = {title: rows for title, _, rows in server_state.sections(state)}
    return _json({"state": tables, "latest": [r["rid"] for r in recent_requests.requests.latest(LISTED)]})


def _own_samples() -> server_state.Samples:
    """The metrics of all processes of this server, as /metrics has them."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=os.environ["PROMETHEUS_MULTIPROC_DIR"])
    return server_state.samples_of(registry.collect())


def routes() -> list:
    """Starlette's routes; plain functions, so that they run beside the event loop."""
    from sglang.srt.utils.auth import AuthLevel, auth_level
    from starlette.routing import Route

    auth_level(AuthLevel.ADMIN_OPTIONAL)(_live)  # else SGLang's middleware turns the admin's key away
    return [Route("/kvshare/", _live), Route("/kvshare/requests/{rid:path}", _request)]


def add_prometheus_middleware(original, app):
    """Around `add_prometheus_middleware`, where SGLang adds /metrics to its app: our pages stand beside it."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    from kvshare_sched.settings import BACKEND

    server_args = getattr(app, "server_args", None)  # None: not the app that serves requests
    if server_args is not None and resolved_view(server_args).radix_cache_backend == BACKEND:
        app.router.routes.extend(routes())
    return original(app)
