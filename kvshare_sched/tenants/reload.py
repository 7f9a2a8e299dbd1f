"""The tenants file on disk: read again when it has changed; a bad edit leaves the old state in force."""

from __future__ import annotations

import logging
import os

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants.file import Tenants, parse

logger = logging.getLogger(__name__)


def read(path: str) -> Tenants:
    """The file at this path, checked. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: cannot be read: {problem}. Name a readable TOML file.") from None
    return parse(text, path)


class TenantsFile:
    """The state in force: that of the last good version of the file."""

    def __init__(self, path: str, pool: int, index: int, longest: int = 0):
        """Raises ConfigError. pool, index, longest: as in `Tenants.check_room`."""
        self._path, self._room = path, (pool, index, longest)
        self._seen = self._stamp()
        self.current = self._read()
        _announce(self.current)

    def poll(self) -> Tenants:
        """The state in force, after a look at the file's date. A bad edit is logged once and changes nothing."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self.current = self._read()
                logger.warning("kvshare: %s read again: %d tenants", self._path, len(self.current.tenants))
                _announce(self.current)
        except ConfigError as problem:
            logger.error("kvshare: the tenants file stays as it was: %s", problem)
        return self.current

    def _stamp(self) -> tuple | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

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
