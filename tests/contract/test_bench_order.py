"""The measurement of the order runs on what SGLang's requests look like today."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import bench_order  # noqa: E402


def test_every_kind_of_pass_is_measured_and_none_of_them_fails(monkeypatch):
    monkeypatch.setattr(bench_order, "PASSES", 3)
    found = bench_order.measure(30)
    assert set(found) == {"flood", "looking", "changed", "unchanged", "duplicates"}
    assert all(0 < kind["median"] <= kind["worst"] for kind in found.values())
