#!/usr/bin/env bash
# prometheus-client 0.26.0: whether `sglang:...` keeps its colon depends on who asks.
#
# Expected: a colon is legal in a metric's name, in every version of both text formats, so SGLang's `sglang:...` series
#   have one name whoever scrapes them; escaping is for names that are not legal.
# Happens: a scraper that prefers OpenMetrics and names no escaping (Prometheus 2) gets the samples as `sglang_...`. In the
#   same answer the HELP and TYPE lines keep the colon, so the samples also lose type and help. With
#   `escaping=allow-utf-8` (Prometheus 3), or as plain text (curl), the colon stays.
# Matters: SGLang's names all begin with `sglang:`. Dashboards and rules that are right under one Prometheus are empty under
#   another, and a look with curl shows names that the database does not have.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --disable-pip-version-check install --quiet prometheus-client==0.26.0

cat > "$dir/run.py" <<'PY'
from importlib.metadata import version
from urllib.request import ProxyHandler, Request, build_opener

from prometheus_client import CollectorRegistry, Counter, start_http_server

print("prometheus-client", version("prometheus-client"))
registry = CollectorRegistry()
Counter("sglang:prompt_tokens", "Tokens of prompts.", registry=registry).inc(3)
server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
url = f"http://127.0.0.1:{server.server_port}/metrics"
SCRAPERS = {
    "OpenMetrics, no escaping": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
    "OpenMetrics, UTF-8":
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3",
    "plain text": "text/plain;version=0.0.4",
}
names, types = {}, {}
for scraper, accept in SCRAPERS.items():
    with build_opener(ProxyHandler({})).open(Request(url, headers={"Accept": accept}), timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    names[scraper] = next(line.split()[0] for line in lines if "tokens_total " in line and line[0] != "#")
    types[scraper] = next(line for line in lines if line.startswith("# TYPE"))
    print(f"{scraper:25}", names[scraper], "|", types[scraper])
server.shutdown()
thread.join()
assert names["OpenMetrics, UTF-8"] == names["plain text"] == "sglang:prompt_tokens_total", "changed: the name kept"
assert names["OpenMetrics, no escaping"] == "sglang_prompt_tokens_total", "changed: the colon stays"
assert types["OpenMetrics, no escaping"] == "# TYPE sglang:prompt_tokens counter", "changed: the type's name"
PY
"$dir/venv/bin/python" "$dir/run.py"
