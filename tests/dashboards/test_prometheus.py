"""Debian's Prometheus against the real metrics, moved by made-up events: series, panels, rules, and each alert."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"
sys.path.insert(0, str(DASHBOARDS))

import generate  # noqa: E402
import local_prometheus  # noqa: E402
from engine import Engine  # noqa: E402

from kvshare_sched.observe.series import LABELS as REPORTS  # noqa: E402
from kvshare_sched.observe.series import SERIES  # noqa: E402
from kvshare_sched.records.request import Outcome, Reason  # noqa: E402

BOARDS = generate.boards()
ALERTS = {a["alert"]: a for g in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"] for a in g["rules"]}
STEPS = 6


@pytest.fixture(scope="module")
def binaries() -> Path:
    try:
        return local_prometheus.binaries()
    except RuntimeError as problem:
        pytest.skip(str(problem))


# ---- a live one ----


@pytest.fixture(scope="module")
def scraped(binaries, tmp_path_factory):
    """(Prometheus, start, end) of some seconds in which everything happened."""
    port = local_prometheus.free_port()
    engine = Engine(port)
    started = time.time()
    with local_prometheus.scraping([f"127.0.0.1:{port}"], tmp_path_factory.mktemp("prometheus")) as prometheus:
        while not prometheus.over("kvshare_enabled", started, time.time() + 1, 1):
            time.sleep(0.2)  # the first scrape has seen everything at zero
        for _ in range(STEPS):
            engine.step()
            time.sleep(1.0)
        yield prometheus, started, time.time()
    engine.stop()


def test_every_series_arrives(scraped):
    prometheus, _, _ = scraped
    assert {name for s in SERIES for name in s.samples} <= prometheus.names()


PANELS = [(name, p["title"]) for name, board in BOARDS.items() for p in generate.panels(board)]


@pytest.mark.parametrize(("board", "title"), PANELS, ids=[" / ".join(p) for p in PANELS])
def test_every_query_of_every_panel_returns_data(scraped, board, title):
    prometheus, start, end = scraped
    panel = next(p for p in generate.panels(BOARDS[board]) if p["title"] == title)
    for text in panel["queries"].values():
        query = generate.promql(text, job=".*", tenant=".*", rate="5s")
        assert prometheus.over(query, start, end, 1), query


def test_recording_rules_give_numbers_and_no_rule_fails(scraped):
    prometheus, start, end = scraped
    rules = [r for group in prometheus.ask("rules")["groups"] for r in group["rules"]]
    assert {r["name"] for r in rules} >= set(ALERTS)
    assert [(r["name"], r["lastError"]) for r in rules if r["health"] == "err"] == []
    shares = [
        v for _, points in prometheus.over("instance:kvshare_reused_share:rate5m", start, end, 1) for _, v in points
    ]
    reused = 80 * sum(outcome is Outcome.REUSED for outcome, _ in REPORTS)
    computed = 50 * sum(reason is not Reason.RETRACTED for _, reason in REPORTS)  # its tokens were counted before
    assert shares and all(v == pytest.approx(reused / (reused + computed), abs=0.005) for v in shares)


# ---- each alert, provoked ----

JOB = 'job="sglang"'
AT = f'{JOB}, instance="a"'
COUNTS = "0+60x600"  # every minute 60 more
LULL = "0+60x60 3600+0x20 3600+60x"  # an hour in there are 20 minutes without any
# alert -> (series while it is wrong, label set of the alert, what makes it right, each by itself)
PROVOKED = {
    "KVShareQualityTargetMissed": (
        {
            f"kvshare_target_kl_nats{{{JOB}}}": "0.03+0x600",
            f'kvshare_audit_kl_nats_sum{{{JOB}, span="sent"}}': "0+0.1x600",
            f'kvshare_audit_kl_nats_count{{{JOB}, span="sent"}}': "0+1x600",
        },
        {"job": "sglang"},
        [
            {f'kvshare_audit_kl_nats_sum{{{JOB}, span="sent"}}': "0+0.01x600"},
            {f'kvshare_audit_kl_nats_count{{{JOB}, span="sent"}}': "0+0.01x600"},  # too few audits to say so
        ],
    ),
    "KVShareReuseStopped": (
        {
            f"kvshare_enabled{{{AT}}}": "1+0x600",
            f'kvshare_prompt_tokens_total{{{AT}, origin="reused"}}': LULL + "220 16800+0x300",
            f'kvshare_prompt_tokens_total{{{AT}, origin="fresh"}}': LULL + "520",
        },
        {"job": "sglang", "instance": "a"},
        [
            {f"kvshare_enabled{{{AT}}}": "0+0x600"},
            {f'kvshare_prompt_tokens_total{{{AT}, origin="fresh"}}': LULL + "220 16800+0x300"},  # no prompts at all
            {f'kvshare_prompt_tokens_total{{{AT}, origin="reused"}}': "0+0x600"},  # there never was any
        ],
    ),
    "KVShareLeasesNotReturning": (
        {
            f"kvshare_leases_held{{{AT}}}": "2+0x600",
            f'sglang:num_running_reqs{{{AT}, tp_rank="0"}}': "0+0x600",
            f"kvshare_requests_total{{{AT}}}": "7+0x600",
        },
        {"job": "sglang", "instance": "a"},
        [
            {f'sglang:num_running_reqs{{{AT}, tp_rank="0"}}': "1+0x600"},
            {f"kvshare_requests_total{{{AT}}}": COUNTS},  # prompts that want one token never count as running
        ],
    ),
    "KVShareIndexAtLimit": (
        {
            f"kvshare_index_tokens{{{JOB}}}": "1960+0x600",
            f"kvshare_index_limit_tokens{{{JOB}}}": "2000+0x600",
            f'kvshare_donors_left_total{{{JOB}, reason="limit"}}': COUNTS,
        },
        {"job": "sglang"},
        [
            {f'kvshare_donors_left_total{{{JOB}, reason="limit"}}': "0+0x600"},
            {f"kvshare_index_tokens{{{JOB}}}": "1000+0x600"},
        ],
    ),
    "KVShareStarvation": (
        {f"kvshare_oldest_wait_seconds{{{AT}}}": "0+60x600", f"kvshare_requests_total{{{AT}}}": COUNTS},
        {"job": "sglang", "instance": "a"},
        [
            {f"kvshare_oldest_wait_seconds{{{AT}}}": "20+0x600"},
            {f"kvshare_requests_total{{{AT}}}": "7+0x600"},
        ],
    ),
    "KVShareOrderFailing": (
        {f'kvshare_order_passes_total{{{AT}, result="failed"}}': "0+1x600"},
        {"job": "sglang", "instance": "a"},
        [{f'kvshare_order_passes_total{{{AT}, result="failed"}}': "0+0x600"}],
    ),
    "KVShareErrors": (
        {
            f'kvshare_requests_total{{{AT}, reason="error"}}': "0+3x600",
            f'kvshare_requests_total{{{AT}, reason="none"}}': COUNTS,
        },
        {"job": "sglang", "instance": "a"},
        [{f'kvshare_requests_total{{{AT}, reason="error"}}': "0+0x600"}],
    ),
}
CASES = [(name, None) for name in PROVOKED] + [(n, i) for n, found in PROVOKED.items() for i in range(len(found[2]))]


def case(name: str, healing: int | None) -> dict:
    """What promtool shall find at the end of six hours. healing: which of the series that make it right are in."""
    provoking, labels, healings = PROVOKED[name]
    alert = ALERTS[name]
    firing = [{"exp_labels": alert["labels"] | labels, "exp_annotations": alert["annotations"]}]
    series = provoking | ({} if healing is None else healings[healing])
    return {
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in series.items()],
        "alert_rule_test": [
            {"alertname": name, "eval_time": "6h", "exp_alerts": firing if healing is None else []},
        ],
    }


def test_every_alert_is_provoked_here():
    assert PROVOKED.keys() == ALERTS.keys()


@pytest.mark.parametrize(("name", "healing"), CASES)
def test_alert_fires_when_things_are_wrong_and_only_then(binaries, tmp_path, name, healing):
    files = [str(DASHBOARDS / n) for n in ("rules.yml", "alerts.yml")]
    (tmp_path / "case.yml").write_text(yaml.safe_dump({"rule_files": files, "tests": [case(name, healing)]}))
    found = subprocess.run(
        [binaries / "promtool", "test", "rules", tmp_path / "case.yml"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_promtool_accepts_config_rules_and_every_metric(binaries):
    checked = subprocess.run(
        [binaries / "promtool", "check", "config", DASHBOARDS / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    from prometheus_client import CollectorRegistry, generate_latest

    from kvshare_sched.observe.metrics import ShareMetrics

    registry = CollectorRegistry()
    ShareMetrics(registry=registry)
    text = b"".join(line + b"\n" for line in generate_latest(registry).splitlines() if b"_created" not in line)
    linted = subprocess.run([binaries / "promtool", "check", "metrics"], input=text, capture_output=True)
    assert linted.returncode == 0, (linted.stdout + linted.stderr).decode()
