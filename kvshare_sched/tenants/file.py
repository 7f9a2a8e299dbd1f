"""The tenants file: TOML in, frozen records out. Pure."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from kvshare_sched.errors import ConfigError

ANONYMOUS, ANY_KEY = "anonymous", "anonymous-any-key"
UNKNOWN = ("reject", ANONYMOUS, ANY_KEY)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"sha256:[0-9a-f]{64}")
_HEADER = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_CREDENTIALS = ("authorization", "x-api-key")
_OF_DONORS = {"donor_tokens", "index_entries", "guaranteed_donor_tokens", "hide_reuse"}
_POOL_SHARE = 0.5  # of the KV pool may be promised to tenants and documents; the rest is for running requests


def _limit(default, kind, low, high, meaning: str):
    return field(default=default, metadata={"kind": kind, "low": low, "high": high, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant: its groups and what it may use at most. None: no limit."""

    name: str
    groups: tuple[str, ...] = ()
    weight: float = _limit(1.0, float, 0.01, 10_000, "share in the order of the queue")
    priority: int = _limit(0, int, -(2**31), 2**31 - 1, "the most urgent priority its requests may have")
    target_kl: float | None = _limit(None, float, 0.0, 100.0, "nats; mean KL(full || approximate) held for it")
    requests: int | None = _limit(None, int, 1, 10**6, "requests in flight")
    tokens: int | None = _limit(None, int, 1, 10**12, "prompt and answer tokens of its requests in flight")
    donor_tokens: int | None = _limit(None, int, 0, 10**12, "tokens kept as donors")
    index_entries: int | None = _limit(None, int, 0, 10**12, "places in the index; a text has some 0.11 for each token")
    guaranteed_donor_tokens: int = _limit(0, int, 0, 10**12, "donor tokens that others' requests never push out")
    hide_reuse: float | None = _limit(None, float, 1.0, 100.0, "times the estimated full prefill that its answers take")


@dataclass(frozen=True, slots=True)
class Group:
    """Tenants that may borrow the group's documents; `trusted`: each other's conversations as well."""

    name: str
    trusted: bool = False
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tenants:
    """Everything the file says. `keys` maps the sha256 of a key (hex) to the tenant it belongs to."""

    tenants: Mapping[str, Tenant]
    groups: Mapping[str, Group]
    keys: Mapping[str, str] = field(repr=False)
    anonymous: Tenant | None  # who comes without a key runs as this one; None: is refused
    any_key: bool = False  # so does who comes with a key, or a gateway's name, that nobody has
    gateway_header: str | None = None  # names the tenant, when one of `gateway_keys` comes with it
    gateway_keys: frozenset[str] = field(default=frozenset(), repr=False)
    operator_keys: frozenset[str] = field(default=frozenset(), repr=False)
    open_paths: frozenset[str] = frozenset()  # served to everybody, besides health checks
    library_tokens: int = 0  # KV tokens that documents may hold pinned, all groups together
    revision: int = 0  # of the promises, counted by `TenantsFile`

    @property
    def promised(self) -> int:
        """KV tokens that ordinary eviction never takes."""
        return self.library_tokens + sum(tenant.guaranteed_donor_tokens for tenant in self.tenants.values())

    @property
    def promises(self) -> tuple:
        """What pins in the engine follow from; compared to see whether an edit concerns them."""
        kept = sorted((t.name, t.donor_tokens or 0, t.guaranteed_donor_tokens) for t in self.tenants.values())
        return self.library_tokens, tuple(sorted(self.groups)), tuple(kept)

    def check_room(self, pool: int, index: int, longest: int) -> None:
        """Raise ConfigError when more is promised than a pool and an index of so many tokens can spare.

        longest: tokens of the longest request; beside what is promised it must always fit.
        """
        room = max(0, min(int(_POOL_SHARE * pool), pool - longest, index))
        if self.promised > room:
            raise ConfigError(
                f"tenants file: guaranteed_donor_tokens and library.tokens sum up to {self.promised}; accepted: "
                f"at most {room} (half of the KV pool's {pool} tokens, what a request of {longest} leaves of it, and "
                f"KVSHARE_INDEX_TOKENS={index}). Lower them, or --context-length."
            )


def parse(text: str, source: str) -> Tenants:
    """Check a tenants file. Raises ConfigError naming file, key, value and what is accepted."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:  # numbers of 4,300 digits and deep nesting are no TOMLDecodeError
        raise ConfigError(f"{source}: not readable as TOML: {problem}. The old state, if any, stays.") from None
    top = {"unknown", "anonymous", "gateway", "operators", "groups", "tenants", "library"}
    _known(source, "", data, top)
    unknown = data.get("unknown")  # has no default: half a file must not open the server
    if unknown not in UNKNOWN:
        raise _wrong(source, "unknown", unknown, ", ".join(UNKNOWN))
    group_tables = _named_tables(source, "groups", data.get("groups", {}))
    tables = _named_tables(source, "tenants", data.get("tenants", {}))
    if ANONYMOUS in tables:
        raise _wrong(source, "tenants", ANONYMOUS, "another name; who is not known is set up in [anonymous]")
    owners: dict[str, str] = {}
    tenants = {}
    for name, table in tables.items():
        where = f"tenants.{name}"
        _known(source, where, table, {"keys", "groups", *_limits()})
        groups = tuple(sorted(set(_texts(source, f"{where}.groups", table.get("groups", [])))))
        for group in groups:
            if group not in group_tables:
                raise _wrong(
                    source, f"{where}.groups", group, f"a group declared as [groups.NAME]{_near(group, group_tables)}"
                )
        for key in _keys(source, f"{where}.keys", table.get("keys", [])):
            _own(source, f"{where}.keys", key, name, owners)
        tenants[name] = Tenant(name, groups, **_read_limits(source, where, table))
    groups = {}
    for name, table in group_tables.items():
        _known(source, f"groups.{name}", table, {"trusted"})
        trusted = table.get("trusted", False)
        if type(trusted) is not bool:
            raise _wrong(source, f"groups.{name}.trusted", trusted, "true or false")
        groups[name] = Group(name, trusted, tuple(sorted(t.name for t in tenants.values() if name in t.groups)))
    stranger = _table(source, "anonymous", data.get("anonymous", {}))
    _known(source, "anonymous", stranger, _limits().keys() - _OF_DONORS)
    # Nothing is shared between strangers, so nothing of them is kept, and there is nothing to hide.
    anonymous = Tenant(ANONYMOUS, donor_tokens=0, **_read_limits(source, "anonymous", stranger))
    header, gateway = _gateway(source, data.get("gateway"), owners)
    operators = _table(source, "operators", data.get("operators", {}))
    _known(source, "operators", operators, {"keys", "open"})
    operator_keys = _keys(source, "operators.keys", operators.get("keys", []))
    for key in operator_keys:
        _own(source, "operators.keys", key, "(operators)", owners)
    opened = _texts(source, "operators.open", operators.get("open", []))
    for path in opened:
        if not path.startswith("/"):
            raise _wrong(source, "operators.open", path, "paths that begin with /")
    library = _table(source, "library", data.get("library", {}))
    _known(source, "library", library, {"tokens"})
    return Tenants(
        MappingProxyType(tenants),
        MappingProxyType(groups),
        MappingProxyType({key: name for key, name in owners.items() if name in tenants}),
        anonymous if unknown != "reject" else None,
        unknown == ANY_KEY,
        header,
        frozenset(gateway),
        frozenset(operator_keys),
        frozenset(opened),
        _number(source, "library.tokens", library.get("tokens", 0), int, 0, 10**12),
    )


def _gateway(source: str, table, owners: dict[str, str]) -> tuple[str | None, list[str]]:
    if table is None:
        return None, []
    _known(source, "gateway", _table(source, "gateway", table), {"header", "keys"})
    header = table.get("header")
    if not isinstance(header, str) or not _HEADER.fullmatch(header.lower()) or header.lower() in _CREDENTIALS:
        raise _wrong(
            source, "gateway.header", header, "a header name such as x-kvshare-tenant, not one that holds keys"
        )
    keys = _keys(source, "gateway.keys", table.get("keys", []))
    if not keys:
        raise _wrong(source, "gateway.keys", table.get("keys"), "at least one key, else anybody could set the header")
    for key in keys:
        _own(source, "gateway.keys", key, "(gateway)", owners)
    return header.lower(), keys


def _limits() -> dict[str, Mapping]:
    return {f.name: f.metadata for f in fields(Tenant) if f.metadata}


def _read_limits(source: str, where: str, table: Mapping) -> dict:
    found = {}
    for name, limit in _limits().items():
        if name in table:
            found[name] = _number(source, f"{where}.{name}", table[name], limit["kind"], limit["low"], limit["high"])
    cap, floor = found.get("donor_tokens"), found.get("guaranteed_donor_tokens", 0)
    if cap is not None and floor > cap:
        raise _wrong(source, f"{where}.guaranteed_donor_tokens", floor, f"at most donor_tokens, {cap}")
    return found


def _number(source: str, where: str, value, kind: type, low, high):
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not low <= value <= high:
        raise _wrong(source, where, value, f"{'a whole number' if kind is int else 'a number'} from {low} to {high}")
    return value


def _keys(source: str, where: str, value) -> list[str]:
    keys = _texts(source, where, value)
    for key in keys:
        if not _KEY.fullmatch(key):
            # The value may be a key in the clear: it is not repeated.
            raise ConfigError(
                f"{source}: {where}: an entry is no hash; accepted: sha256: and 64 hex digits. "
                "Make one with `kvshare tenants key`."
            )
    return [key.removeprefix("sha256:") for key in keys]


def _own(source: str, where: str, key: str, name: str, owners: dict[str, str]) -> None:
    if owners.setdefault(key, name) != name:
        raise ConfigError(
            f"{source}: {where}: a key of {name} is also one of {owners[key]}; accepted: one owner a key."
        )


def _named_tables(source: str, where: str, value) -> dict[str, Mapping]:
    for name, table in _table(source, where, value).items():
        if not _NAME.fullmatch(name):
            raise _wrong(source, where, name, "names of a-z, 0-9, dot, dash, underscore; 64 characters at most")
        _table(source, f"{where}.{name}", table)
    return dict(value)


def _table(source: str, where: str, value) -> Mapping:
    if not isinstance(value, dict):
        raise _wrong(source, where, value, "a table")
    return value


def _texts(source: str, where: str, value) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{source}: {where}: accepted: a list of texts in quotes.")
    return value


def _known(source: str, where: str, table: Mapping, names) -> None:
    for name in table:
        if name not in names:
            place = f"{where}.{name}" if where else name
            raise ConfigError(
                f"{source}: {place} is not known{_near(name, names)}; accepted: {', '.join(sorted(names))}."
            )


def _near(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _wrong(source: str, where: str, value, accepted: str) -> ConfigError:
    return ConfigError(f"{source}: {where} = {str(value)[:80]!r} is not accepted; accepted: {accepted}.")
