#!/usr/bin/env bash
# grafana-foundation-sdk 1769699998!10.1.0: the newest version is the one for the oldest Grafana.
#
# Expected: the package's versions are named after Grafana's, so a requirement `>=11.6.0` gives the SDK for Grafana 11.6 or
#   later, and without a requirement pip takes the one for the latest Grafana.
# Happens: every version has an epoch (the number before `!`), the second at which it was built, and of each release the
#   SDK for the oldest Grafana is built last. The epoch outweighs the rest, so any lower bound is met by the SDK for
#   Grafana 10.1, which pip installs. It writes dashboards of schema 36, and its from_json drops newer fields in silence.
# Matters: SGLang is watched on Grafana boards, and an extension that builds its own from code gets, with the requirement
#   one would write, boards of a Grafana of 2023. Only `==` with the epoch names what is meant.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
newest='1769699998!10.1.0' for_11_6='1769699379!11.6.0' # of the release of January 2026

cat > "$dir/run.py" <<'PY'
import json
from importlib.metadata import version

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as Model

board = json.loads(JSONEncoder().encode(Dashboard("board").build()))
kept = json.loads(JSONEncoder().encode(Model.from_json({"title": "board", "preload": True})))
print(version("grafana-foundation-sdk"), "schema", board["schemaVersion"], "preload", kept.get("preload"))
PY
try() { # NAME REQUIREMENT
  "${PYTHON:-python3}" -m venv "$dir/$1"
  "$dir/$1/bin/python" -m pip --disable-pip-version-check install --quiet "$2"
  "$dir/$1/bin/python" "$dir/run.py"
}
asked=$(try asked "grafana-foundation-sdk>=11.6.0,<=$newest")
meant=$(try meant "grafana-foundation-sdk==$for_11_6")
echo "grafana-foundation-sdk>=11.6.0 (up to $newest): $asked"
echo "grafana-foundation-sdk==$for_11_6: $meant"
[ "$asked" = "$newest schema 36 preload None" ] || { echo "changed: what the lower bound gives" >&2; exit 1; }
[ "$meant" = "$for_11_6 schema 41 preload True" ] || { echo "changed: the SDK for 11.6" >&2; exit 1; }
