"""The measurement of index, matcher and planner runs on what they look like today, and leaves other figures alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import bench_core  # noqa: E402


def test_everything_is_measured_in_the_state_it_names():
    times, sizes = bench_core.full_index(64, 21, capacity=4_096)
    assert sizes["full_64"]["tokens"] > 4_000 and sizes["full_64"]["reused"] == 32
    equal, charge = bench_core.equal_tokens(3, 2_000), bench_core.charges(3, 20)
    assert equal[1]["equal"]["reused"] == 1_999 and 0 < charge[1]["charge"]["cut_at"] < charge[1]["charge"]["prompt"]
    times |= equal[0] | charge[0]
    assert set(times) == {"publish_ms_full_64", "request_ms_full_64", "lookup_ms_equal_2k", "charge_ms_20"}
    assert all(ms > 0 for samples in times.values() for ms in samples)


def test_the_result_is_written_beside_what_others_wrote(tmp_path):
    path = tmp_path / "core.json"
    path.write_text(json.dumps({"figures": {"faults_fixed": 11, "a_ms": 9}, "bench_requests": 5}))
    found = {"now": bench_core.summary([{"times": {"a_ms": [1.0, 2.0, 3.0]}, "sizes": {}}])}
    bench_core.write(path, found)
    assert json.loads(path.read_text()) == {
        "figures": {"faults_fixed": 11, "a_ms": 2.0},
        "bench_requests": 5,
        "core": found,
    }
