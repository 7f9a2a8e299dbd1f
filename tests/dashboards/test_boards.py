"""The generated files are what the generator makes; boards, rules and alerts name only series that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"
sys.path.insert(0, str(DASHBOARDS))

import generate  # noqa: E402

from kvshare_sched.observe.series import SERIES  # noqa: E402

BOARDS = generate.boards()
MADE = {name: generate.dashboard(name, board) for name, board in BOARDS.items()}
SAMPLES = {name for s in SERIES for name in s.samples}


def rules(name: str) -> list[dict]:
    return [r for group in yaml.safe_load((DASHBOARDS / name).read_text())["groups"] for r in group["rules"]]


RULES, ALERTS = rules("rules.yml"), rules("alerts.yml")
ASKED = [q for board in BOARDS.values() for panel in generate.panels(board) for q in panel["queries"].values()]
ASKED += [r["expr"] for r in (*RULES, *ALERTS)]


def panels(name: str) -> list[dict]:
    return [p for p in MADE[name]["panels"] if p["type"] != "row"]


@pytest.mark.parametrize("path", generate.files(), ids=lambda path: path.name)
def test_what_is_committed_is_what_the_generator_makes(path):
    assert path.read_text() == generate.files()[path], "run python dashboards/generate.py"


def test_five_boards():
    assert list(BOARDS) == ["overview", "tenants", "quality", "scheduler", "capacity"]
    assert len({board["title"] for board in BOARDS.values()}) == 5


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows(name):
    for panel in panels(name):
        assert panel["title"] and panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"] and all(target["expr"] for target in panel["targets"])
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", BOARDS)
def test_source_and_job_are_variables(name):
    made = MADE[name]
    variables = {v["name"] for v in made["templating"]["list"]}
    assert {"datasource", "job"} <= variables
    for panel in panels(name):
        for target in panel["targets"]:
            assert panel["datasource"]["uid"] == target["datasource"]["uid"] == "${datasource}"
            selectors = re.findall(r"\{[^}]*\}", target["expr"])
            assert len(selectors) == len(re.findall(r"kvshare_\w+|sglang\.", target["expr"]))
            assert all('job=~"$job"' in selector for selector in selectors), target["expr"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_beside_each_other(name):
    made = MADE[name]["panels"]
    assert len({p["id"] for p in made}) == len(made)
    taken = set()
    for panel in made:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken
        taken |= cells


def test_queries_name_only_series_that_exist():
    asked = {name for text in ASKED for name in re.findall(r"(?<![\w:])kvshare_\w+", text)}
    assert asked <= SAMPLES, asked - SAMPLES
    recorded = {name for text in ASKED for name in re.findall(r"(?:job|instance):\w+:\w+", text)}
    assert recorded == {r["record"] for r in RULES}


def test_every_series_is_on_a_board():
    shown = "\n".join(ASKED)
    assert [s.name for s in SERIES if not any(sample in shown for sample in s.samples)] == []


def test_labels_asked_for_are_those_of_the_series():
    known = {name: {*s.labels, "le"} for s in SERIES for name in s.samples}
    for text in ASKED:
        for name, inside in re.findall(r"(kvshare_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)(?:=|!=)", inside)) <= known.get(name, set()), text


def test_series_of_sglang_are_still_there():
    import sglang.srt.observability as observability

    folder = Path(observability.__path__[0])
    source = (folder / "metrics_collector.py").read_text()
    names = {re.sub("_bucket$", "", n) for text in ASKED for n in re.findall(r"sglang\.(\w+)", text)}
    assert names == {"time_to_first_token_seconds", "num_running_reqs", "num_queue_reqs", "token_usage"}
    assert [name for name in names if f'"sglang:{name}"' not in source] == []


def test_every_alert_says_what_to_do():
    for alert in ALERTS:
        assert alert["alert"].startswith("KVShare") and alert["for"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        for text in (alert["annotations"]["summary"], alert["annotations"]["runbook"]):
            assert text.endswith(".") and "{{" not in text


def test_the_stack_listens_where_the_readme_says():
    compose = yaml.safe_load((DASHBOARDS / "docker-compose.yml").read_text())["services"]
    readme = (DASHBOARDS / "README.md").read_text()
    assert "127.0.0.1:9090" in " ".join(compose["prometheus"]["command"]) and "9090" in readme
    assert compose["grafana"]["environment"]["GF_SERVER_HTTP_PORT"] == "3000" and "3000" in readme
    source = yaml.safe_load((DASHBOARDS / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://127.0.0.1:9090"
    boards = yaml.safe_load((DASHBOARDS / "provisioning/dashboards/kvshare.yml").read_text())["providers"][0]
    mounts = [line.split(":")[:2] for service in compose.values() for line in service["volumes"]]
    assert ["./boards", boards["options"]["path"]] in mounts
    assert all((DASHBOARDS / path).exists() for path, _ in mounts)
