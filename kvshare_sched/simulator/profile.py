"""What one engine's work costs, measured on a live server by `scripts/profile_engine.py`; seconds and tokens."""

from __future__ import annotations

import bisect
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kvshare_sched.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs of one engine. A prefill pass costs pass_s + rows x row_s + (rows x keys they see) x key_s + copies."""

    pass_s: float  # a prefill pass, whatever is in it
    row_s: float  # a prompt token that is computed
    key_s: float  # a computed token looking at one earlier token
    copy_s: float  # a reused token copied into place
    reuse_s: float  # a request that reuses, over one that does not
    recompute: float  # share of the reused tokens that is computed again
    decode_s: tuple[tuple[int, float], ...]  # (running requests, seconds of one step), ascending
    decode_key_s: float = 0.0  # an output token looking at one earlier token; `decode_s` is of short prompts
    request_s: float = 0.0  # from a client's socket to the queue, and back
    chunk: int = 4096  # prefill tokens of one pass
    capacity: int = 100_000  # tokens of KV
    running: int = 256  # requests at a time
    machine: str = ""  # for the reader

    def __post_init__(self):
        steps = [batch for batch, _ in self.decode_s]
        if not steps or steps != sorted(set(steps)) or steps[0] < 1:
            raise ConfigError(f"decode_s={self.decode_s!r} must list (running requests, seconds), ascending from 1.")

    def prefill(self, rows: float, keys: float) -> float:
        """Seconds of `rows` tokens that look at `keys` tokens each on average."""
        return rows * (self.row_s + keys * self.key_s)

    def decode(self, running: int, keys: float = 0.0) -> float:
        """Seconds of one step that looks at `keys` tokens in all.

        Between measured sizes on a line, beyond them along the last one.
        """
        if len(self.decode_s) == 1:
            return self.decode_s[0][1] + keys * self.decode_key_s
        steps = [batch for batch, _ in self.decode_s]
        upper = min(max(1, bisect.bisect_left(steps, running)), len(steps) - 1)
        (a, at_a), (b, at_b) = self.decode_s[upper - 1], self.decode_s[upper]
        rows_s = max(min(at_a, at_b), at_a + (at_b - at_a) * (running - a) / (b - a))
        return rows_s + keys * self.decode_key_s

    @property
    def copy_price(self) -> float:
        """A copied token, in tokens of ordinary prefill."""
        return self.copy_s / self.row_s


def read(path: str | Path) -> Profile:
    """Raises ConfigError for what is no profile."""
    try:
        data = json.loads(Path(path).read_text())
        return Profile(**(data | {"decode_s": tuple((int(n), float(s)) for n, s in data["decode_s"])}))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ConfigError(
            f"profile {path} cannot be read ({type(problem).__name__}: {problem}); expected a file written by "
            "scripts/profile_engine.py."
        ) from None


def write(path: str | Path, profile: Profile) -> None:
    """For `read`."""
    Path(path).write_text(json.dumps(asdict(profile), indent=1) + "\n")
