"""`kvshare tenants` and `kvshare documents`: what the command line does with files and with a running server."""

from __future__ import annotations

import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from kvshare_sched.errors import SetupError
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tenants.reload import read

_PATIENCE_S = 600


def new_key() -> int:
    """Print a key of 256 random bits and its hash."""
    key = f"kvs-{secrets.token_urlsafe(32)}"
    print(f"key:  {key}\nhash: {hash_of(key)}")
    return 0


def check(path: str) -> int:
    """Say what a tenants file declares; raises ConfigError for what is wrong with it."""
    found = read(path)
    trusted = [name for name, group in found.groups.items() if group.trusted]
    print(f"{path}: {len(found.tenants)} tenants, {len(found.groups)} groups, {found.promised} tokens promised")
    if trusted:
        print(f"trusted groups, whose members borrow each other's conversations: {', '.join(trusted)}")
    return 0


class Documents:
    """The library of a running server."""

    def __init__(self, url: str):
        """Raises SetupError without an operator's key."""
        self._url = f"{url.rstrip('/')}/kvshare/documents"
        key = os.environ.get("KVSHARE_ADMIN_KEY", "")
        if not key:
            raise SetupError("KVSHARE_ADMIN_KEY is not set; set it to a key of [operators] in the tenants file.")
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def list(self) -> int:
        for found in self._call("GET")["documents"]:
            state = "resident" if found["resident"] else "not computed"
            print(f"{found['group']}\t{found['name']}\tversion {found['version']}\t{found['tokens']} tokens\t{state}")
        return 0

    def remove(self, group: str, name: str) -> int:
        found = self._call("DELETE", query=urlencode({"group": group, "name": name}))
        if found["dropped"]:
            print(f"{found['name']}: removed")
            return 0
        print(f"{found['name']}: removed, but the engine may still lend it; it is tried again. Ask again to see.")
        return 1

    def add(self, group: str, paths: Sequence[str], name: str | None, system: str, ttl: float | None) -> int:
        """Add files one by one; what is refused is told and the others go on. Returns 1 if any was refused."""
        files = _files(paths)
        if name is not None and len(files) != 1:
            raise SetupError(f"--name names one document; {len(files)} files were given. Leave it out.")
        refused = 0
        for number, path in enumerate(files, 1):
            body = {"group": group, "name": name or path.as_posix(), "text": _text(path), "system": system}
            place = f"[{number}/{len(files)}] {body['name']}"
            try:
                found = self._call("POST", body | ({"ttl_s": ttl} if ttl is not None else {}))
                print(f"{place}: version {found['version']}, {found['tokens']} tokens", flush=True)
            except SetupError as problem:
                refused += 1
                print(f"{place}: {problem}", file=sys.stderr, flush=True)
        return 1 if refused else 0

    def _call(self, method: str, body: dict | None = None, query: str = "") -> dict:
        url = f"{self._url}?{query}" if query else self._url
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as problem:
            text = problem.read().decode(errors="replace")
            raise SetupError(f"{url} answered {problem.code}: {_message(text)}") from None
        except (urllib.error.URLError, TimeoutError) as problem:
            raise SetupError(f"{url} cannot be reached: {problem}. Start the server, or give its --url.") from None


def _files(paths: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise SetupError(f"{path} does not exist; give text files or folders.")
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise SetupError(f"{path} cannot be read as UTF-8 text: {problem}.") from None


def _message(text: str) -> str:
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:300]
