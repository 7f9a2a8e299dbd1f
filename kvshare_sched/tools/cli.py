"""The console command `kvshare`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from kvshare_sched import __version__
from kvshare_sched.errors import KVShareError
from kvshare_sched.evaluation.cases import KINDS
from kvshare_sched.evaluation.methods import METHODS
from kvshare_sched.evaluation.tasks import TASKS
from kvshare_sched.loadtest.arrivals import ARRIVALS
from kvshare_sched.loadtest.workloads import WORKLOADS
from kvshare_sched.scheduling.order import KEYS

_SERVE_HELP = """start stock SGLang; every SGLang argument passes through, kvshare only fills in defaults:
--radix-cache-backend kvshare, --enable-metrics and, without a GPU, --device cpu, --dtype float32,
--attention-backend kvshare_cpu, and the embedded model when no --model-path is given"""

_EVAL_HELP = """compare every method with full prefill over the same donors, on one server: KL, task scores with
confidence intervals, computed cells, times; what is not an option below is passed to SGLang"""

_BENCH_HELP = """play traces against a running server, or start several set-ups and compare them on the same traces:
time to first token, throughput, goodput, tenants, token origins; what is not an option below is passed to SGLang"""


_SERVER = "http://127.0.0.1:30000"


def _serve(options, rest: list[str]) -> int:
    from kvshare_sched.client import launch, model

    arguments = launch.fill_defaults(rest)
    if not any(a.split("=")[0] in ("--model-path", "--model") for a in rest):
        arguments += ["--model-path", str(model.prepare())]
    line = launch.command(arguments)
    print("[kvshare serve] " + " ".join(line[1:]), file=sys.stderr, flush=True)
    os.execv(line[0], line)


def _model(options, rest: list[str]) -> int:
    from kvshare_sched.client import model

    path = model.prepare()
    if options.print_path:
        print(path)
    return 0


def _doctor(options, rest: list[str]) -> int:
    from kvshare_sched.tools import doctor

    return doctor.examine(rest)


def _demo(options, rest: list[str]) -> int:
    from kvshare_sched.tools import demo

    return demo.run(cases=options.cases, out=options.out)


def _eval(options, rest: list[str]) -> int:
    from kvshare_sched.evaluation import run

    return run.run(
        cases=options.cases,
        task_names=options.tasks,
        method_names=options.methods,
        ratios=options.ratios,
        donors=options.donors,
        kinds=options.kinds,
        model_path=options.model_path,
        out=options.out,
        server_arguments=rest,
    )


def _explain(options, rest: list[str]) -> int:
    from kvshare_sched.tools import inspect

    who = {"key": options.key, "extra_key": options.extra_key, "cache_salt": options.cache_salt}
    return inspect.explain_request(options.url.rstrip("/"), options.rid, **who, html=options.html)


def _top(options, rest: list[str]) -> int:
    from kvshare_sched.tools import inspect

    return inspect.top(options.url.rstrip("/"), key=options.key, interval_s=options.interval, once=options.once)


def _simulate(options, rest: list[str]) -> int:
    from kvshare_sched.simulator import report

    return report.run(options)


def _bench(options, rest: list[str]) -> int:
    from kvshare_sched.loadtest import run
    from kvshare_sched.loadtest.statistics import Slo

    return run.run(
        url=options.url,
        setups=options.compare,
        names=options.traces,
        requests=options.requests,
        arrivals=options.arrivals,
        rate=options.rate,
        loads=options.loads,
        seconds=options.seconds,
        repeats=options.repeats,
        interleave_s=options.interleave,
        sockets=options.sockets,
        slo=Slo(options.slo_ttft, options.slo_tpot),
        check_counts=options.check_counts,
        model_path=options.model_path,
        out=options.out,
        server_arguments=rest,
    )


def _tenants(options, rest: list[str]) -> int:
    from kvshare_sched.tenants import commands

    return commands.new_key() if options.action == "key" else commands.check(options.file)


def _documents(options, rest: list[str]) -> int:
    from kvshare_sched.tenants import commands

    shop = commands.Documents(options.url)
    if options.action == "list":
        return shop.list()
    if options.action == "remove":
        return shop.remove(options.group, options.name)
    return shop.add(options.group, options.paths, options.name, options.system, options.ttl)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in _names(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvshare", description="Non-prefix KV reuse for SGLang.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_start, _add_eval, _add_simulate, _add_bench, _add_tenants, _add_look, _add_prepare):
        add(commands)
    return parser


def _add_start(commands) -> None:
    """serve, demo"""
    serve = commands.add_parser("serve", help="start stock SGLang with our defaults", description=_SERVE_HELP)
    serve.set_defaults(run=_serve, passes_through=True)
    demo = commands.add_parser("demo", help="reuse off and on, side by side, on the embedded model")
    demo.add_argument("--cases", type=int, default=8, help="prompts; half of 2,000 and half of 4,000 tokens")
    demo.add_argument("--out", default="out", help="folder for demo.json and the picture")
    demo.set_defaults(run=_demo, passes_through=False)


def _add_eval(commands) -> None:
    """eval"""
    quality = commands.add_parser(
        "eval", help="answer quality of every method against full prefill", description=_EVAL_HELP
    )
    quality.add_argument("--cases", type=int, default=60, help="dealt to the tasks in turn")
    quality.add_argument("--tasks", type=_names, default=list(TASKS), help=f"of {','.join(TASKS)}; or .jsonl files")
    quality.add_argument("--methods", type=_names, default=list(METHODS), help=f"of {','.join(METHODS)}")
    quality.add_argument("--ratios", type=_numbers, default=[0.18, 0.3], help="of kvshare; the first is the main one")
    quality.add_argument("--donors", type=int, default=4, help="earlier contexts of each document")
    quality.add_argument("--kinds", type=_names, default=list(KINDS), help=f"of donors: {','.join(KINDS)}")
    quality.add_argument("--model-path", help="a model folder; without it the embedded model")
    quality.add_argument("--out", default="out/eval", help="folder for report.json, report.md and frontier.png")
    quality.set_defaults(run=_eval, passes_through=True)


def _add_simulate(commands) -> None:
    """simulate"""
    simulate = commands.add_parser(
        "simulate", help="what an order of the queue would do at your scale: the server's queue, a model of the engine"
    )
    simulate.add_argument("--profile", default="benchmarks/profile-cpu.json", help="by scripts/profile_engine.py")
    simulate.add_argument("--trace", help="a trace of `kvshare bench`; without it, traffic over shared libraries")
    simulate.add_argument("--speed", type=float, default=1.0, help="how many times as fast the trace is played")
    simulate.add_argument("--requests", type=int, default=10_000, help="made up, when no trace is given")
    simulate.add_argument("--tenants", type=int, default=100)
    simulate.add_argument("--rate", type=float, default=1.0, help="requests a second")
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--orders", type=_names, default=list(KEYS), help=f"of {','.join(KEYS)}")
    simulate.add_argument("--out", default="out/simulate.json", help="all figures")
    simulate.set_defaults(run=_simulate, passes_through=False)


def _add_bench(commands) -> None:
    """bench"""
    bench = commands.add_parser(
        "bench", help="load test: a running server, or set-ups compared", description=_BENCH_HELP
    )
    bench.add_argument("--url", help="a running SGLang; without it --compare starts servers")
    bench.add_argument(
        "--compare", type=_names, default=["stock", "kvshare"], help="set-ups: stock, kvshare, or either as NAME+POLICY"
    )
    bench.add_argument("--traces", type=_names, default=["rag", "agents"], help=f"of {','.join(WORKLOADS)}; or files")
    bench.add_argument("--requests", type=int, help="length of a workload drawn anew; of a file, its first requests")
    bench.add_argument("--arrivals", choices=sorted(ARRIVALS), default="poisson", help="of a workload drawn anew")
    bench.add_argument("--rate", type=float, help="requests a second, instead of --loads or a trace's own pace")
    bench.add_argument(
        "--loads",
        type=_numbers,
        default=[2.0, 4.0],
        help="load factors; 1 is the saturated throughput of the first set-up",
    )
    bench.add_argument("--seconds", type=float, default=75, help="what the first set-up needs for one load")
    bench.add_argument("--repeats", type=int, default=1, help="of everything; more than one shows the spread")
    bench.add_argument(
        "--interleave",
        type=float,
        metavar="SECONDS",
        help="all set-ups in turns of so long, the others halted: a machine that drifts does so for all of them",
    )
    bench.add_argument("--sockets", type=int, default=256, help="open at once; further requests wait on this side")
    bench.add_argument("--slo-ttft", type=float, default=5.0, help="seconds to the first token that are good enough")
    bench.add_argument("--slo-tpot", type=float, default=0.5, help="seconds a later token that are good enough")
    bench.add_argument(
        "--check-counts",
        action="store_true",
        help="with --url, on a server nobody else uses: exit with 1 unless answers and /metrics count the same tokens",
    )
    bench.add_argument("--model-path", help="a model folder; without it the embedded model")
    bench.add_argument("--out", default="out/bench", help="folder for raw rows, report.json, report.md and pictures")
    bench.set_defaults(run=_bench, passes_through=True)


def _add_tenants(commands) -> None:
    """tenants, documents"""
    tenants = commands.add_parser("tenants", help="make an API key with its hash; check a tenants file")
    actions = tenants.add_subparsers(dest="action", required=True)
    actions.add_parser("key", help="print a new key and the hash that goes into the tenants file")
    actions.add_parser("check", help="say what is wrong with a tenants file").add_argument("file")
    tenants.set_defaults(run=_tenants, passes_through=False)
    documents = commands.add_parser(
        "documents", help="the library of a running server; an operator's key is read from KVSHARE_ADMIN_KEY"
    )
    documents.add_argument("--url", default=_SERVER)
    actions = documents.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="compute files, or all files of folders, and lend them to a group")
    add.add_argument("group")
    add.add_argument("paths", nargs="+", help="UTF-8 text files, or folders")
    add.add_argument("--name", help="of one file; without it its path as given")
    add.add_argument("--system", default="", help="text that stands in front when the KV is computed")
    add.add_argument("--ttl", type=float, help="seconds until a document leaves")
    actions.add_parser("list", help="documents, one a line")
    remove = actions.add_parser("remove", help="lend a document no longer")
    remove.add_argument("group")
    remove.add_argument("name")
    documents.set_defaults(run=_documents, passes_through=False)


def _add_look(commands) -> None:
    """explain, top"""
    explain = commands.add_parser(
        "explain", help="one request of a running server: where every token came from, and why"
    )
    explain.add_argument("rid", help='the "id" of its answer')
    explain.add_argument("--url", default=_SERVER)
    key = {"default": os.environ.get("KVSHARE_ADMIN_KEY", "")}
    explain.add_argument("--key", **key, help="an admin's API key, if it has any; with a tenants file, or a tenant's")
    explain.add_argument("--extra-key", default="", help="a tenant's own, instead of an admin's key")
    explain.add_argument("--cache-salt", default="", help="likewise")
    explain.add_argument("--html", help="write a page to this file instead")
    explain.set_defaults(run=_explain, passes_through=False)
    top = commands.add_parser("top", help="the state of a running server: hit rates, queue, tenants, index, quality")
    top.add_argument("--url", default=_SERVER)
    top.add_argument("--key", **key, help="an operator's API key, where /metrics needs one")
    top.add_argument("--interval", type=float, default=2.0, help="seconds")
    top.add_argument("--once", action="store_true", help="print the counts since its start, and end")
    top.set_defaults(run=_top, passes_through=False)


def _add_prepare(commands) -> None:
    """model, doctor"""
    model = commands.add_parser("model", help="prepare the embedded model, once")
    model.add_argument("--print-path", action="store_true", help="print its folder as the last line of stdout")
    model.set_defaults(run=_model, passes_through=False)
    doctor = commands.add_parser("doctor", help="what is installed and what would be refused; takes SGLang arguments")
    doctor.set_defaults(run=_doctor, passes_through=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Known errors are one readable line."""
    # Leave through the `with` blocks, so that a server we started is stopped when we are.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.passes_through:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest)
    except KVShareError as problem:
        print(f"kvshare: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
