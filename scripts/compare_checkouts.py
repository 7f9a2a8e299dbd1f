"""Do two versions answer and report the same? 200 fixed requests on the engine test bench of each, token for token.

    python scripts/compare_checkouts.py --before v0.1.0 [--out out/checkouts.json]

The version before is checked out under out/ and gets an environment of its own that borrows this one's packages.
Compared are output tokens, log-probabilities and every figure of the report but those that are times of this run.
`SAME_WORD` lists public words that have changed between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = 200
METHODS = ("consensus", "consensus", "dhd", "cacheblend", "epic", "naive", "random", "full")
SETTINGS = (  # engine arguments and settings; the requests are spread over them
    {"loop": "normal", "page": 1},
    {"loop": "overlap", "page": 1, "chunk": 256},
    {"loop": "normal", "page": 16, "settings": {"repair_rows": 2}},
    {"loop": "normal", "page": 1, "settings": {"mode": "discover"}},
)
TIMES = {"match_s", "copy_s", "recompute_s"}
SAME_WORD = {"kvshare": "dhd", "renewed": "promoted"}


def record(file: Path) -> None:
    """Send the requests to the bench of the checkout in the current folder; one JSON object a request."""
    sys.path.insert(0, str(Path.cwd() / "tests" / "engine"))
    import bench
    import models

    method_names = set(_names())
    model = models.write_llama(file.parent / "model")
    rows = []
    for number, setting in enumerate(SETTINGS):
        with bench.running(model, **{"pool": 6000} | setting) as engine:
            for tickets in _batches(engine, random.Random(number), REQUESTS // len(SETTINGS), method_names):
                engine.run()
                rows += [_row(ticket) for ticket in tickets]
    file.write_text(json.dumps(rows))


def _names() -> tuple[str, ...]:
    try:
        from kvshare_sched.methods.registry import names
    except ImportError:  # where a version before has them
        from kvshare_sched.strategies import names
    return names()


def _batches(engine, draw: random.Random, count: int, names: set[str]):
    """Up to three requests at a time, of documents that come back in other places behind other beginnings."""
    documents = [[draw.randrange(5, 250) for _ in range(draw.randrange(60, 200))] for _ in range(8)]
    former = {new: old for old, new in SAME_WORD.items()}
    while count:
        size = min(count, draw.randrange(1, 4))
        tickets = []
        for _ in range(size):
            chosen = draw.sample(documents, draw.randrange(1, 4))
            begin, end = ([draw.randrange(5, 250) for _ in range(draw.randrange(3, 40))] for _ in range(2))
            method, ratio = draw.choice(METHODS), draw.choice((0.1, 0.2, 0.5, 1.0))
            wish = {"strategy": method if method in names else former[method], "ratio": ratio}
            custom = draw.choice(({"kvshare": wish}, {"kvshare": wish}, None, {"kvshare": "off"}))
            scored = {"return_logprob": True} if draw.random() < 0.3 else {}
            prompt = [*begin, *(token for document in chosen for token in document), *end]
            tickets.append(engine.send(prompt, tokens=draw.randrange(1, 8), custom=custom, **scored))
        count -= size
        yield tickets


def _row(ticket) -> dict:
    report = {SAME_WORD.get(k, k): SAME_WORD.get(v, v) if isinstance(v, str) else v for k, v in ticket.report.items()}
    report = {k: v for k, v in report.items() if k not in TIMES | {"details"}}
    return {"output": ticket.output, "logprobs": ticket.output_logprobs, "report": report}


def environment(checkout: Path, folder: Path) -> Path:
    """The interpreter of an environment with this checkout's packages and all others of the running one."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    borrowed = sysconfig.get_path("purelib")
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*install, "-e", str(checkout)], check=True)
    words = next(w for w in (checkout / "scripts/setup.sh").read_text().split() if w.endswith(".torchvision_ops"))
    (site / "zz-torchvision.pth").write_text(f"import {words} as _ops; _ops.install()\n")
    return python


def main() -> int:
    """Returns 0 when all requests agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="commit, branch or tag to compare with")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "checkouts.json")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return 0
    work = options.out.parent / "checkouts"
    work.mkdir(parents=True, exist_ok=True)
    checkout = work / "before"
    if not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    subprocess.run(["git", "checkout", "--quiet", options.before], cwd=checkout, check=True)
    sides = {"before": (environment(checkout, work / "env"), checkout), "after": (Path(sys.executable), ROOT)}
    found = {}
    for name, (python, folder) in sides.items():
        print(f"{name}: {REQUESTS} requests ...", flush=True)
        file = work / f"{name}.json"
        (work / name).mkdir(exist_ok=True)
        quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
        script = Path(__file__).resolve()
        subprocess.run([python, script, "--record", file.resolve()], cwd=folder, env=quiet, check=True)
        found[name] = json.loads(file.read_text())
    pairs = list(zip(found["before"], found["after"], strict=True))
    different = [{"request": n, "before": a, "after": b} for n, (a, b) in enumerate(pairs) if a != b]
    outcomes = {o: sum(b["report"]["outcome"] == o for _, b in pairs) for o in ("reused", "discovered", "ordinary")}
    result = {"requests": len(pairs), "identical": len(pairs) - len(different), "outcomes": outcomes}
    options.out.write_text(json.dumps({"before": options.before, **result, "different": different[:20]}, indent=1))
    print(result)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
