#!/usr/bin/env python
"""Write docs/settings.md from the metadata of the settings.

python scripts/write_docs.py    # after a change of kvshare_sched/settings.py; tests/unit/docs/test_docs.py compares
"""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[1] / "docs"
_WIDTH = 120
_BEFORE = """\
# Settings

Generated from `kvshare_sched/settings.py` by `python scripts/write_docs.py`.

Values come from the defaults, then from a TOML file named by `KVSHARE_CONFIG`, then from the variables below. Keys of
the file are the names in lower case without the prefix: `min_run = 48`. All values are printed once at start. A wrong
value is refused at launch with one line. Settings marked *per request* may also be set in a request:
`"custom_params": {"kvshare": {"ratio": 0.3}}`.
"""
_AFTER = """\
## Notes

- `KVSHARE_STRATEGY`: the methods are described in [serving.md](serving.md#reuse-methods). `consensus` spends less
  than the ratio where the left context of donors and prompt agrees.
- `KVSHARE_CHECK_LAYER` is used by `dhd` and `cacheblend`: all rows run up to this layer, then the choice is made.
- `KVSHARE_REPAIR_ORDER`: `fifo` repairs all tokens in ascending order and ends at exact KV; `lagged` and `attention`
  repair by importance.
- `KVSHARE_QUANTUM`, `KVSHARE_TENANT_WEIGHTS`, `KVSHARE_DUPLICATE_WAIT`, `KVSHARE_POOL_KEEP`: the bounds that follow
  are in [kvshare_sched/scheduling/README.md](../kvshare_sched/scheduling/README.md).
- `KVSHARE_TENANTS_FILE`, `KVSHARE_LIBRARY`, `KVSHARE_BORROW_LOG`: [tenants.md](tenants.md).
- `KVSHARE_AUDIT_SHARE`, `KVSHARE_TARGET_KL`: [quality.md](quality.md#the-running-server-audits-itself).

Variables that are no settings: `KVSHARE_CONFIG` (path of the TOML file), `KVSHARE_CACHE` (folder of the embedded
model), `KVSHARE_ADMIN_KEY` (an operator's key, for the commands), `KVSHARE_STAMP_SECRET` (one secret for several
nodes).
"""


def _module() -> ModuleType:
    from kvshare_sched import settings  # late, so that importing this script needs nothing

    return settings


def _fields(settings: ModuleType) -> tuple[Field, ...]:
    """The fields of the one dataclass that holds the settings."""
    for value in vars(settings).values():
        if is_dataclass(value) and any(item.name == "preset" for item in fields(value)):
            return fields(value)
    raise LookupError("kvshare_sched.settings holds no dataclass with a field `preset`")


def _accepted(item: Field) -> str:
    """Unit and range, or the accepted values."""
    limits = item.metadata
    choices = limits["choices"]
    if item.name == "strategy":
        from kvshare_sched.methods import registry

        choices = registry.names()
    if choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    low, high = limits["low"], limits["high"]
    if low is not None and high is not None:
        allowed = f"{low:g} to {high:g}"
    else:
        allowed = "" if low is None else f"at least {low:g}"
    return ", ".join(part for part in (limits["unit"], allowed) if part)


def _entry(item: Field) -> str:
    default = f"{item.default:_}" if type(item.default) is int and item.default >= 10_000 else item.default
    head = f"- **`KVSHARE_{item.name.upper()}`**, default " + (f"`{default}`" if default != "" else "empty")
    about = "; ".join(part for part in (_accepted(item), "*per request*" if item.metadata["request"] else "") if part)
    reason = item.metadata["reason"]
    text = f"{head} ({about}). {reason[0].upper()}{reason[1:]}."
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def settings_page() -> str:
    """docs/settings.md."""
    settings = _module()
    presets = [
        "## Presets",
        "",
        "A preset sets several settings together; each of them may still be set by name.",
        "",
        "| preset | sets |",
        "|---|---|",
    ]
    for name, values in settings.PRESETS.items():
        presets.append(f"| `{name}` | " + ", ".join(f"`{key} = {value}`" for key, value in values.items()) + " |")
    entries = "\n".join(map(_entry, _fields(settings)))
    return "\n".join((_BEFORE, "## All settings", "", entries, "", *presets, "", _AFTER))


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    return {DOCS / "settings.md": settings_page()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
        print(path.relative_to(DOCS.parent))
