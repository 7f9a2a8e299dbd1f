"""Figures of the code's structure, by the contract tests' own definitions; writes benchmarks/house.json.

python scripts/house_figures.py [--ci-minutes M] [--checkouts out/checkouts.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "contract"))

import test_rooms as rooms  # noqa: E402
import test_seams as seams  # noqa: E402


def circles() -> int:
    """Groups of modules that import each other, counted as modules left when all others are taken away."""
    left = {m: {n for n in names if n in rooms.MODULES and n != m} for m, names in rooms.IMPORTS.items()}
    while free := [m for m, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    return len(left)


def figures() -> dict[str, object]:
    """All that can be counted without running anything."""
    pairs = [(m, n) for m, names in rooms.IMPORTS.items() for n in names if n in rooms.MODULES]
    outside = [
        m
        for m, names in rooms.IMPORTS.items()
        if any(n.split(".")[0] == "sglang" for n in names) and not m.startswith(rooms.ENGINES["sglang"])
    ]
    return {
        "rooms": len({path.parent for path in rooms.MODULES.values()}),
        "circles": circles(),
        "upward_imports": sum(rooms.floor_of(n) > rooms.floor_of(m) for m, n in pairs),
        "modules_importing_sglang_outside_engine": outside,
        "seams_unlisted": len(set().union(*(seams.unlisted(file.read_text())[1] for file in seams.scanned()))),
        "readme_characters": len((ROOT / "README.md").read_text()),
    }


def main() -> None:
    """Write the figures, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ci-minutes", type=float, help="of `.ci/run` in a fresh clone, as seen")
    parser.add_argument("--checkouts", type=Path, help="what compare_checkouts.py has written")
    options = parser.parse_args()
    found = figures()
    if options.ci_minutes is not None:
        found["ci_minutes"] = options.ci_minutes
    if options.checkouts:
        compared = json.loads(options.checkouts.read_text())
        found["requests_identical"], found["requests_before"] = compared["identical"], compared["before"]
    command = "python scripts/compare_checkouts.py --before COMMIT; python scripts/house_figures.py --checkouts ..."
    (ROOT / "benchmarks" / "house.json").write_text(json.dumps({"command": command, "figures": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
