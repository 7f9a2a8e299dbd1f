"""The tenants file on disk: read again when it has changed; a bad edit leaves the old state in force."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants.file import Tenants, parse

logger = logging.getLogger(__name__)
_SETTLED_S = 1.0  # without a change, before a file is read


class Unreadable(ConfigError):
    """The file could not be read now; that says nothing about what is in it."""


def read(path: str) -> Tenants:
    """The file at this path, checked. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as problem:
        raise Unreadable(f"{path}: cannot be read: {problem}. Name a readable TOML file.") from None
    return parse(text, path)


class TenantsFile:
    """The state in force: that of the last good version of the file."""

    def __init__(self, path: str, pool: int, index: int, longest: int = 0, clock=time.time):
        """Raises ConfigError. pool, index, longest: as in `Tenants.check_room`."""
        self._path, self._room, self._clock = path, (pool, index, longest), clock
        self._said = ""
        self._seen = self._stamp()
        self.current = self._read()
        _announce(self.current)

    def poll(self) -> Tenants:
        """The state in force, after a look at the file's date. A bad edit is logged once and changes nothing."""
        stamp = self._stamp()
        if stamp == self._seen or self._unsettled(stamp):
            return self.current
        self._seen = stamp
        try:
            found = self._read()
            if self._stamp() != stamp:  # written while it was read
                self._seen = None
                return self.current
            revision = self.current.revision + (found.promises != self.current.promises)
            self.current, self._said = replace(found, revision=revision), ""
            logger.warning("kvshare: %s read again: %d tenants", self._path, len(found.tenants))
            _announce(found)
        except ConfigError as problem:
            if isinstance(problem, Unreadable):
                self._seen = None  # so that it is tried again
            if str(problem) != self._said:
                self._said = str(problem)
                logger.error("kvshare: the tenants file stays as it was: %s", problem)
        return self.current

    def _unsettled(self, stamp: tuple | None) -> bool:
        """Whether the file was changed a moment ago: its writer may not have ended, and half a file may be valid."""
        return stamp is not None and 0 <= self._clock() - stamp[-1] / 1e9 < _SETTLED_S

    def _stamp(self) -> tuple | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def _read(self) -> Tenants:
        found = read(self._path)
        found.check_room(*self._room)
        return found


def _announce(tenants: Tenants) -> None:
    for group in tenants.groups.values():
        if group.trusted:
            logger.warning(
                "kvshare: TRUSTED GROUP %s: %s borrow KV of EACH OTHER'S CONVERSATIONS. A member's prompts can steer "
                "the answers of the others.",
                *(group.name, ", ".join(group.members) or "nobody"),
            )
