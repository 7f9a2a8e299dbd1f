"""`kvshare eval`: start the server, run the cases one after the other, write the report as it grows."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Client
from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation import formats, methods, report, tasks, texts
from kvshare_sched.evaluation.cases import KINDS, SEED, Case, Prompt
from kvshare_sched.evaluation.measure import ANSWER_TOKENS, Bench
from kvshare_sched.evaluation.statistics import RESAMPLES
from kvshare_sched.settings import KVShareConfig


def run(
    *,
    cases: int,
    task_names: Sequence[str],
    method_names: Sequence[str],
    ratios: Sequence[float],
    donors: int,
    kinds: Sequence[str],
    model_path: str | None,
    out: str,
    server_arguments: Sequence[str],
) -> int:
    """Measure and write `report.json`, `report.md` and `frontier.png` into `out`; returns the exit code.

    task_names: names in `tasks.TASKS`, or .jsonl files (`formats.read`); the cases are dealt to them in turn.
    Raises ConfigError for what does not exist, SetupError when the server does not come up.
    """
    methods.check_names(method_names, ratios)
    if donors < 1:
        raise ConfigError(f"--donors {donors} leaves nothing to reuse; accepted: 1 or more.")
    chosen = deal(task_names, cases, donors, kinds)
    path, folder = Path(model_path) if model_path else model.prepare(), Path(out)
    pool = () if model_path or "--max-total-tokens" in server_arguments else launch.SMALL_POOL
    arguments = launch.fill_defaults(["--model-path", str(path), *server_arguments, *pool])
    render = renderer(path)
    print("starting stock SGLang with the kvshare backend ...", flush=True)
    # An audit would leave the exact KV of a prompt behind that the next method is to reuse.
    environment, log = {"KVSHARE_AUDIT_SHARE": "0"}, folder / "eval-server.log"
    with launch.running([*arguments, "--log-level", "warning"], env=environment, log=log) as url:
        client = Client(url)
        chosen = fitting(chosen, render, client.context_length())
        warm_up = client.generate(render(chosen[0].donors[0]), new_tokens=4, namespace="warm-up")
        layers, config = warm_up.report["layers"], KVShareConfig.load(os.environ | environment)
        columns = methods.resolve(method_names, ratios, layers, config)
        settings = {
            "model": path.name,
            "cases": len(chosen),
            "tasks": list(task_names),
            "methods": {c.name: {"family": c.family, "budget": c.budget, "reuse": c.reuse} for c in columns},
            "ratios": list(ratios),
            "donors": donors,
            "donor_kinds": list(kinds),
            "server_arguments": [a for a in arguments if a != str(path)],
            "server_settings": config.describe(),
            "layers": layers,
            **_circumstances(),
        }
        print(_measure(Bench(client, render), chosen, columns, folder, settings))
    return 0


def _circumstances() -> dict:
    """What else a repetition needs to be the same; nothing in it depends on the day."""
    return {
        "answer_tokens": ANSWER_TOKENS,
        "seed": SEED,
        "resamples": RESAMPLES,
        "texts": texts.digest(texts.library()),
        **report.made_with(),
    }


def _measure(bench: Bench, chosen: list[Case], columns: list[methods.Method], folder: Path, settings: dict) -> str:
    """Run the cases; an interruption reports what was measured before it goes on its way."""
    rows, started = [], time.monotonic()
    try:
        for number, case in enumerate(chosen, 1):
            rows.append(bench.run(case, columns))
            report.write_json(folder, {"settings": settings, "cases": rows})
            left = (time.monotonic() - started) / number * (len(chosen) - number)
            print(f"{number:4}/{len(chosen)} {report.progress(rows[-1])}  {left / 60:.1f} min left", flush=True)
    finally:
        said = report.write_all(folder, settings | {"cases": len(rows)}, rows) if rows else "nothing was measured"
    return said


def deal(task_names: Sequence[str], count: int, donors: int, kinds: Sequence[str] = KINDS) -> list[Case]:
    """`count` cases with donors of these kinds, one task after the other; a used-up file gives its turn to the rest."""
    if not kinds or not set(kinds) <= set(KINDS):
        raise ConfigError(f"--kinds {','.join(kinds)} is not known; accepted: {', '.join(KINDS)}, or both.")
    library = texts.library()
    fillers = [" ".join(p) for p in library[:8]]

    def supply(name: str) -> Iterator[Case]:
        if name.endswith(".jsonl"):
            return formats.read(name, donors=donors, fillers=fillers)
        if name not in tasks.TASKS:
            raise ConfigError(f"task {name!r} is not known; accepted: {', '.join(tasks.TASKS)}, or a .jsonl file.")
        return (tasks.build(name, i, donors=donors, passages=library) for i in itertools.count())

    supplies = [(case for case in supply(name) if case.donor_kind in kinds) for name in task_names]
    dealt: list[Case] = []
    while supplies and len(dealt) < count:
        turn = [(s, next(s, None)) for s in supplies]
        supplies = [s for s, case in turn if case is not None]
        dealt += [case for _, case in turn if case is not None]
    if not dealt:
        raise ConfigError(f"no case in {', '.join(task_names)} for --cases {count}; give at least one.")
    return dealt[:count]


def fitting(cases: list[Case], render: Callable[[Prompt], list[int]], context_length: int) -> list[Case]:
    """The cases whose prompts all leave room for an answer; says how many do not. Raises ConfigError for none."""
    room = context_length - 2 * ANSWER_TOKENS
    found = [c for c in cases if all(len(render(p)) <= room for p in (c.target, *c.donors))]
    if not found:
        raise ConfigError(
            f"no case fits into the model's {context_length} tokens; take shorter texts or another model."
        )
    if len(found) < len(cases):
        print(f"{len(cases) - len(found)} of {len(cases)} cases are longer than {room} tokens and left out", flush=True)
    return found


def renderer(path: Path) -> Callable[[Prompt], list[int]]:
    """Prompt -> token ids, in the chat template of the model in that folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)

    def render(prompt: Prompt) -> list[int]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        # Templates of reasoning models take `enable_thinking`; the others ignore it.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return tokenizer.encode(text + prompt.answer_start, add_special_tokens=False)

    return render
