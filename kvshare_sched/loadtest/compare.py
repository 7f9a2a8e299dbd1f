"""Server set-ups on one trace: the same requests, sockets, pool and seed for each.

One after the other, or interleaved: all are started, and take turns of a few seconds in which the others are halted, so
that while all of them run a machine whose speed drifts does so for each. The first set-up says what "load 1" is: what
it completes at the highest load, which comes first and whose pace is set by the warm-up, sent all at once. All set-ups
are offered the same rates. Raw rows go to `raw/`; what they mean is `report`'s business.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import requests as http

from kvshare_sched.client import launch, model
from kvshare_sched.client.device import has_nvidia_gpu
from kvshare_sched.errors import ConfigError, SetupError
from kvshare_sched.evaluation.report import made_with
from kvshare_sched.loadtest import blocks, counts, quality, traces
from kvshare_sched.loadtest.runner import Player, Turn, play_in_turn, write_rows
from kvshare_sched.loadtest.statistics import Slo, answered, makespan_s
from kvshare_sched.loadtest.traces import Request, Trace

_SINGLES = 4  # warm-up requests sent one by one: what happens once per tenant, an audit say, happens here
_FEWEST = 8  # requests at a load point
_QUALITY_PROMPTS = 4
_QUIET_S, _PATIENCE_S = 1.0, 60.0  # a server that has had nothing to do for so long is idle; how long to wait for that
# What a halted server must not do when it goes on: close sockets that looked idle meanwhile, or end itself.
_PATIENT = ({"SGLANG_TIMEOUT_KEEP_ALIVE": "86400"}, ("--watchdog-timeout", "86400"))


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to start SGLang."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    reuses: bool  # its answers may differ from full prefill


@dataclass(frozen=True, slots=True)
class _Side:
    """A set-up whose server has been started."""

    setup: Setup
    player: Player
    awake: Callable[[], AbstractContextManager]  # the server may be spoken to in this block, and perhaps only there


def setup(name: str, common: Sequence[str]) -> Setup:
    """`stock` (lpm) or `kvshare` (as `kvshare serve`), or either with another of SGLang's policies: `kvshare+fcfs`.

    Stock keeps the CPU platform where there is no GPU, so that both compute with the same operators.
    """
    base, _, policy = name.partition("+")
    chosen = ("--schedule-policy", policy) if policy else ()
    filled = launch.fill_defaults(common)
    if base == "kvshare":
        return Setup(name, (*filled, *chosen), {}, True)
    if base != "stock":
        raise ConfigError(f"set-up {name!r} is not known; accepted: stock, kvshare, each also as NAME+POLICY.")
    backend = filled.index("--radix-cache-backend")
    plain = (*filled[:backend], *filled[backend + 2 :])
    plugins = "__none__" if has_nvidia_gpu() else "kvshare_cpu"
    return Setup(name, (*plain, *(chosen or ("--schedule-policy", "lpm"))), {"SGLANG_PLUGINS": plugins}, False)


def against(
    url: str, chosen: Sequence[Trace], *, rate: float | None, sockets: int, slo: Slo, out: Path
) -> dict[str, dict]:
    """Play every trace once against a server that is already running; returns `counts.sources` of each."""
    settings = {"model": _model_of(url), "server": url, "rate": rate, "prompt_tokens": {}}
    _prepare(out, settings, sockets, slo)
    for trace in chosen:
        due, before = traces.retimed(trace.requests, rate), counts.scraped(url)
        rows = Player(url, sockets=sockets).play(due, trace.name)
        after = counts.scraped(url)
        about = _about("server", trace.name, None, 0, counts.longest_waits(before, after))
        write_rows(out / "raw" / f"server-{trace.name}.jsonl", about, rows)
        settings["prompt_tokens"][trace.name] = counts.sources(rows, before, after)
        _save(out, settings)
    return settings["prompt_tokens"]


def compare(
    names: Sequence[str],
    chosen: Sequence[Trace],
    *,
    rate: float | None,
    loads: Sequence[float],
    seconds: float,
    repeats: int,
    interleave_s: float | None,
    sockets: int,
    slo: Slo,
    out: Path,
    model_path: str | None,
    server_arguments: Sequence[str],
) -> None:
    """Start each set-up, play all traces at all loads, leave the raw rows in `out/raw`.

    rate: requests a second at load 1; without it the first set-up says what load 1 is.
    seconds: how long the first set-up needs for one load point, which sets the number of requests.
    interleave_s: length of a turn; without it each set-up is started when the one before has ended.
    """
    path = Path(model_path) if model_path else model.prepare()
    given = {a.split("=")[0] for a in server_arguments}
    pool = () if model_path or "--max-total-tokens" in given else launch.SMALL_POOL
    seed = () if "--random-seed" in given else ("--random-seed", "1")
    setups = [setup(n, ["--model-path", str(path), *server_arguments, *pool, *seed]) for n in names]
    settings = {
        "model": path.name,
        "rate": rate,
        "loads": list(loads),
        "seconds": seconds,
        "repeats": repeats,
        "interleave_s": interleave_s,
        "setups": {s.name: {"arguments": [a for a in s.arguments if a != str(path)]} for s in setups},
        "texts": blocks.digest(),
        **made_with(),
        "rough_capacity_rps": {},
        "capacity_rps": {},
        "quality": {},
    }
    _prepare(out, settings, sockets, slo)
    halts = interleave_s is not None
    for repeat in range(repeats):
        order = rotated(setups, repeat)
        for group in [order] if halts else [[one] for one in order]:
            with ExitStack() as servers:
                started = [(one, servers.enter_context(_started(one, halts, out))) for one in group]
                for trace in chosen:
                    sides = [
                        _Side(one, Player(found.url, sockets=sockets), found.awake if halts else nullcontext)
                        for one, found in started
                    ]
                    _points(sides, trace, settings, repeat, out)
                    _save(out, settings)


@contextmanager
def _started(one: Setup, halts: bool, out: Path) -> Iterator[launch.Launched]:
    """The server of a set-up, halted where set-ups take turns."""
    print(f"starting {one.name} ...", flush=True)
    environment, arguments = _PATIENT if halts else ({}, ())
    arguments = [*one.arguments, *arguments, "--log-level", "warning"]
    log = out / f"server-{one.name}.log"
    with launch.launched(arguments, env=one.environment | environment, log=log) as found:
        if halts:
            found.halt()
        yield found


def rotated(setups: Sequence[Setup], repeat: int) -> list[Setup]:
    """Every repeat begins with another set-up: machines drift, and who comes later meets a slower one."""
    first = repeat % len(setups)
    return [*setups[first:], *setups[:first]]


def _points(sides: Sequence[_Side], trace: Trace, settings: dict, repeat: int, out: Path) -> None:
    """Warm-up, every load point, and the quality of what was just served."""
    warm_up = traces.parts(trace, [])[0]
    for side in sides:
        with side.awake():
            _flush(side.player.client.url)
            rows = side.player.play(_at_once(warm_up), f"{side.setup.name} {trace.name} warm-up")
        settings["rough_capacity_rps"].setdefault(trace.name, settings["rate"] or _throughput(rows))
    rough = settings["rough_capacity_rps"][trace.name]
    loads = sorted(settings["loads"], reverse=True)
    room = (len(trace.requests) - len(warm_up) - 2 * _SINGLES) // len(loads) - 4  # a session is never torn
    count = max(_FEWEST, min(round(rough * settings["seconds"]), room))
    _, singles, *points = traces.parts(trace, [_SINGLES] + [count] * len(loads))
    for side in sides:
        with side.awake():
            for request in singles:
                side.player.play(_at_once([request]), f"{side.setup.name} {trace.name} warm-up")
    for load, part in zip(loads, points, strict=True):
        rate = load * (rough if load == loads[0] else settings["capacity_rps"][trace.name])
        _point(sides, trace.name, load, traces.retimed(part, rate), settings, repeat, out)
    for side in sides:
        if side.setup.reuses and repeat == 0:
            asked = points[0][:: max(1, len(points[0]) // _QUALITY_PROMPTS)][:_QUALITY_PROMPTS]
            with side.awake():
                found = quality.divergence(side.player, asked)
            settings["quality"].setdefault(trace.name, {})[side.setup.name] = found


def _point(
    sides: Sequence[_Side], name: str, load: float, due: Sequence[Request], settings: dict, repeat: int, out: Path
) -> None:
    """One load point of a workload; the first side's throughput is its capacity unless that is known."""
    before, turns = [], []
    for side in sides:
        with side.awake():
            _settle(side.player.client.url)
            before.append(counts.scraped(side.player.client.url))
        turns.append(Turn(side.player, f"{side.setup.name} {name} load {load:g}", side.awake))
    found = play_in_turn(turns, due, settings["interleave_s"])
    for side, then, rows in zip(sides, before, found, strict=True):
        file = out / "raw" / f"{side.setup.name}-{name}-{load:g}-{repeat}.jsonl"
        write_rows(file, _about(side.setup.name, name, load, repeat, {}), rows)  # whatever becomes of the servers
        with side.awake():
            waits = counts.longest_waits(then, counts.scraped(side.player.client.url))
        write_rows(file, _about(side.setup.name, name, load, repeat, waits), rows)
    for rows in found:  # each must have answered something
        settings["capacity_rps"].setdefault(name, _throughput(rows))


def _throughput(rows: Sequence[dict]) -> float:
    """Requests completed a second. Raises SetupError when there was none."""
    done = answered(rows)
    if not done:
        raise SetupError(f"none of {len(rows)} requests was answered; the first said: {rows[0]['error']}")
    return round(len(done) / makespan_s(done), 4)


def _at_once(requests: Sequence[Request]) -> tuple[Request, ...]:
    return tuple(replace(r, at_s=0.0) for r in requests)


def _about(setup_name: str, workload: str, load: float | None, repeat: int, waits: dict) -> dict:
    return {"setup": setup_name, "workload": workload, "load": load, "repeat": repeat, "waits": waits}


def _prepare(out: Path, settings: dict, sockets: int, slo: Slo) -> None:
    """An empty `raw` folder with the settings: rows of another run must not mix with these."""
    for old in (out / "raw").glob("*.jsonl"):
        old.unlink()
    settings |= {"sockets": sockets, "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}}
    _save(out, settings)


def _save(out: Path, settings: dict) -> None:
    (out / "raw").mkdir(parents=True, exist_ok=True)
    (out / "raw" / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")


def _model_of(url: str) -> str:
    try:
        return http.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    except (http.RequestException, ValueError, LookupError) as problem:
        raise SetupError(f"no SGLang server answers at {url} ({problem}); give the URL of a running one.") from None


def _settle(url: str) -> None:
    """Wait until nothing runs or waits any more, audits included."""
    deadline = time.monotonic() + _PATIENCE_S
    quiet_since = None
    while time.monotonic() < deadline:
        load = http.get(f"{url}/v1/loads", timeout=60).json()["loads"][0]
        busy = load["num_running_reqs"] or load["num_waiting_reqs"]
        quiet_since = None if busy else quiet_since or time.monotonic()
        if quiet_since is not None and time.monotonic() - quiet_since >= _QUIET_S:
            return
        time.sleep(0.2)
    raise SetupError(f"the server at {url} did not become idle within {_PATIENCE_S:.0f} s")


def _flush(url: str) -> None:
    """Empty the cache: workloads must not help each other."""
    _settle(url)
    http.post(f"{url}/flush_cache", timeout=60).raise_for_status()
