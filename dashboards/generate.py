#!/usr/bin/env python
"""Write the generated files of this folder: boards/*.json for Grafana, metrics.md from the table of series.

python dashboards/generate.py    # after a change of panels.yml or kvshare_sched/series.py; a test compares
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from kvshare_sched.observe.series import PREFIX, SERIES, Series

HERE = Path(__file__).resolve().parent
SCHEMA = 39  # Grafana 11; newer ones migrate it on import
_COLUMNS, _HEIGHT, _STAT_HEIGHT = 24, 8, 4
_WIDTH = {"timeseries": 12, "stat": 6}
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_OPTIONS = {
    "timeseries": {
        "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
}


def boards() -> dict[str, dict]:
    """panels.yml: name -> board."""
    return yaml.safe_load((HERE / "panels.yml").read_text())


def panels(board: dict) -> list[dict]:
    """A board's panels, whatever row they stand in."""
    return [panel for row in board["rows"].values() for panel in row]


def promql(text: str, *, job: str = "$job", tenant: str = "$tenant", rate: str = "$__rate_interval") -> str:
    """PromQL of a panel's query; the defaults are Grafana's variables."""
    text = text.replace("{T", f'{{J, tenant=~"{tenant}"').replace("{J", f'{{job=~"{job}"')
    return text.replace("[R]", f"[{rate}]")


# ---- Grafana ----


def _panel(panel: dict, number: int, where: dict) -> dict:
    kind = panel.get("kind", "timeseries")
    defaults = {"unit": panel["unit"]}
    if kind == "timeseries":
        stack = panel.get("stack", False)
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 60 if stack else 10, "showPoints": "never"}
        defaults["custom"]["stacking"] = {"mode": "normal" if stack else "none", "group": "A"}
    return {
        "id": number,
        "type": kind,
        "title": panel["title"],
        "description": panel["about"],
        "datasource": _SOURCE,
        "gridPos": where,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[kind],
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": promql(text),
                "legendFormat": legend,
                "range": True,
                "editorMode": "code",
            }
            for i, (legend, text) in enumerate(panel["queries"].items())
        ],
    }


def _placed(board: dict) -> list[dict]:
    placed, y = [], 0
    for title, row in board["rows"].items():
        where = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        head = {
            "id": len(placed) + 1,
            "type": "row",
            "title": title,
            "gridPos": where,
            "collapsed": False,
            "panels": [],
        }
        placed.append(head)
        x, y, height = 0, y + 1, 0
        for panel in row:
            kind = panel.get("kind", "timeseries")
            width = panel.get("width", _WIDTH[kind])
            if x + width > _COLUMNS:
                x, y = 0, y + height
            height = _STAT_HEIGHT if kind == "stat" else _HEIGHT
            placed.append(_panel(panel, len(placed) + 1, {"x": x, "y": y, "w": width, "h": height}))
            x += width
        y += height
    return placed


def _chosen_by(name: str, label: str, series: str) -> dict:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": name},
        "definition": f"label_values({series}, {name})",
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def dashboard(name: str, board: dict) -> dict:
    """One board as Grafana imports it; data source and job are variables, so nothing needs an edit."""
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}},
        _chosen_by("job", "Job", PREFIX + "enabled"),
    ]
    if board.get("by_tenant"):
        variables.append(_chosen_by("tenant", "Tenant", PREFIX + 'tenant_requests_total{job=~"$job"}'))
    return {
        "uid": f"kvshare-{name}",
        "title": board["title"],
        "description": board["about"],
        "tags": ["kvshare", "sglang"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "links": [
            {"type": "dashboards", "title": "kvshare", "tags": ["kvshare"], "asDropdown": False, "keepTime": True}
        ],
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": _placed(board),
    }


# ---- the docs ----


def _row(s: Series) -> str:
    fixed = {label: dict.fromkeys(values[i] for values in s.values) for i, label in enumerate(s.labels)}
    labels = "; ".join(f"`{label}`: {', '.join(values)}" if values else f"`{label}`" for label, values in fixed.items())
    name = PREFIX + s.name + ("_total" if s.kind == "counter" else "")
    about = s.help.replace("|", "\\|")
    return f"| `{name}` | {s.kind} | {labels} | {about} |"


def metrics_table() -> str:
    """All series, as Markdown."""
    return "\n".join(
        (
            "# All series",
            "",
            "Generated from `kvshare_sched/series.py` by `python dashboards/generate.py`. Values named here exist from",
            "the start; of `tenant` there are the first 32 by name, `other`, and `(default)` for requests without an",
            "`extra_key`; with a tenants file the names are those of the file.",
            "",
            "| series | type | labels | meaning |",
            "|---|---|---|---|",
            *map(_row, SERIES),
            "",
        )
    )


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    made = {HERE / "boards" / f"{n}.json": json.dumps(dashboard(n, b), indent=1) + "\n" for n, b in boards().items()}
    return made | {HERE / "metrics.md": metrics_table()}


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path.relative_to(HERE.parent))
