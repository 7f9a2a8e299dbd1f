"""`kvshare explain` and `kvshare top`: what a running server knows of a request, and of itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import requests

from kvshare_sched.engine.sglang.http import pages as http_pages
from kvshare_sched.errors import SetupError
from kvshare_sched.observe import explain, render, server_state

_CLEAR = "\033[2J\033[H"


def explain_request(url: str, rid: str, *, key: str, extra_key: str, cache_salt: str, html: str | None) -> int:
    """Print one request, or write it as a page; raises SetupError when the server does not tell."""
    headers = {http_pages.EXTRA_KEY: extra_key, http_pages.CACHE_SALT: cache_salt}
    own, answer = f"/kvshare/requests/{quote(rid, safe='')}", None
    if key:
        headers["authorization"] = f"Bearer {key}"
        answer = _get(f"{url}/kvshare/?{urlencode({'rid': rid})}", headers)
    if answer is None or answer.status_code in (401, 403):  # no admin's key; perhaps a tenant's
        answer = _get(url + own, headers)
    if answer.status_code != 200:
        raise SetupError(f"request {rid}: the server answers {answer.status_code}: {answer.text[:300]}")
    record = answer.json()
    if html is not None:
        Path(html).write_text(http_pages.request_page(record))
        print(html)
        return 0
    print(f"Request {rid}\n{render.text_bar(record['details']['runs'], sys.stdout.isatty())}\n")
    print(render.text_tables(explain.sections(record)))
    return 0


def top(url: str, *, key: str, interval_s: float, once: bool) -> int:
    """Print the state, once since the server's start, or again and again with what happened in between."""
    before = None
    while True:
        samples = _samples(url, key)
        text = render.text_tables(server_state.sections(server_state.State(samples, before)))
        if once:
            print(text)
            return 0
        since = "since its start" if before is None else f"in the last {interval_s:g} s"
        print(f"{_CLEAR}{url}: counts {since}; Ctrl-C ends\n\n{text}", flush=True)
        before = samples
        try:
            time.sleep(interval_s)
        except KeyboardInterrupt:
            return 0


def _samples(url: str, key: str) -> server_state.Samples:
    answer = _get(f"{url}/metrics", {"authorization": f"Bearer {key}"} if key else {})
    found = server_state.samples_in(answer.text) if answer.status_code == 200 else {}
    if not any(name.startswith("kvshare_") for name in found):
        raise SetupError(f"{url}/metrics has no kvshare_ series: start it with `kvshare serve`, or --enable-metrics.")
    return found


def _get(url: str, headers: dict) -> requests.Response:
    try:
        return requests.get(url, headers=headers, timeout=30)
    except requests.RequestException as problem:
        raise SetupError(f"{url}: {problem}") from None
