"""`kvshare demo`: two tenants, documents that come back elsewhere, reuse off and on, side by side.

One stock SGLang server with our plugin on the embedded model. Each case sends a tenant's first prompt (which
leaves donors behind), then a second prompt with the same documents in another order behind another system
prompt, once without reuse and once with. "Without" is the same server, backend and cache, with the request
opted out in a namespace of its own, so that nothing but reuse differs. Text: Python's own language reference
(`pydoc_data.topics`), which every Python ships.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Answer, Client, kl_divergence

_DOC_TOKENS = 480
_ANSWER_TOKENS = 24
_SEED = 20260730
_TENANTS = (
    ("orchid", "You are the documentation assistant of team Orchid. Answer from the sections below."),
    ("basalt", "You help the support desk of team Basalt. Be brief, and quote the section you use."),
)
_OTHER_SYSTEMS = (
    "You are a senior reviewer at team Orchid. You are terse, and you name the section that decides.",
    "Team Basalt writes training material with you. Use plain words and one short example.",
)
_QUESTIONS = (
    "What do these sections have in common?",
    "Explain the first section in one sentence.",
    "Which of these sections is about names, and what does it say?",
    "Summarise the last section for a beginner.",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt measured without and with reuse."""

    prompt_tokens: int
    off: Answer
    on: Answer
    kl: float
    noise: float  # KL of a second full prefill, computed in other chunks

    @property
    def limit(self) -> float:
        """(prompt rows x layers) / (cells computed): the ratio a cell-proportional engine would reach."""
        report = self.on.report
        rows = report["reused"] + report["fresh"]
        return rows * report["layers"] / report["computed_cells"]

    @property
    def ratio(self) -> float:
        return self.off.ttft_s / self.on.ttft_s


def library(client: Client) -> list[str]:
    """Sections of Python's language reference, each cut to about _DOC_TOKENS tokens."""
    from pydoc_data.topics import topics

    sections = []
    for name in sorted(topics):
        words = f"## {name}\n{topics[name]}"
        tokens = client.tokenize(words)
        if len(tokens) > _DOC_TOKENS:
            sections.append(words[: int(len(words) * _DOC_TOKENS / len(tokens))])
    return sections


def prompt_of(system: str, sections: list[str], question: str) -> str:
    """A chat prompt in the embedded model's template."""
    body = "\n\n".join(sections)
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{body}\n\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def measure(client: Client, number: int, sections: list[str]) -> Case:
    """Run one case; even numbers are prompts of about 2,000 tokens, odd ones of 4,000."""
    rng = random.Random(_SEED + number)
    tenant, system = _TENANTS[number // 2 % 2]
    count = (2_000, 4_000)[number % 2] // _DOC_TOKENS
    chosen = [sections[(number * 8 + i) % len(sections)] for i in range(count)]
    client.generate(prompt_of(system, chosen, _QUESTIONS[0]), new_tokens=1, namespace=tenant)

    moved = chosen[:]
    while any(a is b for a, b in zip(chosen, moved, strict=True)):
        rng.shuffle(moved)
    question = _QUESTIONS[1 + number % 3]
    prompt = client.tokenize(prompt_of(_OTHER_SYSTEMS[number // 2 % 2], moved, question))

    # Namespaces of their own keep the reference out of the tenant's tree, and the other way round.
    reference, chunked = f"{tenant}/reference/{number}", f"{tenant}/chunked/{number}"
    off = client.generate(prompt, new_tokens=_ANSWER_TOKENS, namespace=reference, reuse=False)
    on = client.generate(prompt, new_tokens=_ANSWER_TOKENS, namespace=tenant)
    ids = client.likely_ids(prompt, off.token_ids, reference)

    def log_p(namespace, reuse):
        return client.log_probabilities(prompt, off.token_ids, ids, namespace, reuse=reuse)[0]

    full = log_p(reference, False)
    kl = kl_divergence(full, log_p(tenant, True))
    # A third of the prompt first: the rest is then prefilled behind it, in other chunks than before.
    client.generate(prompt[: len(prompt) // 3], new_tokens=1, namespace=chunked, reuse=False)
    noise = kl_divergence(full, log_p(chunked, False))
    return Case(len(prompt), off, on, kl, noise)


def run(*, cases: int, out: str) -> int:
    """Start the server, measure, print, write `demo.json` and `demo.png` into `out`; returns the exit code."""
    path = model.prepare()
    folder = Path(out)
    arguments = [*launch.fill_defaults(["--model-path", str(path)]), "--log-level", "warning"]
    print("starting stock SGLang with the kvshare backend ...", flush=True)
    # An audit would leave exact KV of a measured prompt behind, and every case is asked twice.
    with launch.running(arguments, env={"KVSHARE_AUDIT_SHARE": "0"}, log=folder / "demo-server.log") as url:
        client = Client(url)
        sections = library(client)
        client.generate(prompt_of("Warm up.", sections[-2:], "?"), new_tokens=2, namespace="warm-up")
        print(
            f"{_ROW.format('case', 'tokens', 'off s', 'on s', 'ratio', 'limit', 'origin of every prompt token', 'KL')}"
        )
        measured = []
        for number in range(cases):
            case = measure(client, number, sections)
            measured.append(case)
            r = case.on.report
            origin = (
                f"exact {r['exact']:3} reused {r['reused']:4} (recomputed {r['recomputed']:3}) fresh {r['fresh']:2}"
            )
            print(
                _ROW.format(
                    number + 1,
                    case.prompt_tokens,
                    f"{case.off.ttft_s:.2f}",
                    f"{case.on.ttft_s:.2f}",
                    f"{case.ratio:.2f}",
                    f"{case.limit:.2f}",
                    origin,
                    f"{case.kl:.4f}",
                ),
                flush=True,
            )
    result = summarise(measured)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    _picture(measured, result, folder / "demo.png")
    print(_closing(result, folder))
    return 0


_ROW = "{:>4} {:>6} {:>7} {:>7} {:>6} {:>6}  {:<54} {:>7}"


def summarise(measured: list[Case]) -> dict:
    """The figures of `out/demo.json`."""

    def median(values) -> float:
        return round(statistics.median(values), 4)

    def total(origin: str) -> int:
        return sum(c.on.report[origin] for c in measured)

    by_length = {}
    for name, part in (("2000", measured[::2]), ("4000", measured[1::2])):
        if part:
            by_length[name] = {
                "ttft_ratio_median": median(c.ratio for c in part),
                "limit_median": median(c.limit for c in part),
                "share_of_limit_median": median(c.ratio / c.limit for c in part),
            }
    ratios = sorted(c.ratio for c in measured)
    return {
        "sglang_version": importlib.metadata.version("sglang"),
        "model": model.MODEL_NAME,
        "strategy": measured[0].on.report["strategy"],
        "cases": len(measured),
        "prompt_tokens_median": median(c.prompt_tokens for c in measured),
        "ttft_off_s_median": median(c.off.ttft_s for c in measured),
        "ttft_on_s_median": median(c.on.ttft_s for c in measured),
        "ttft_ratio_median": median(ratios),
        "ttft_ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "limit_median": median(c.limit for c in measured),
        "share_of_limit_median": median(c.ratio / c.limit for c in measured),
        "by_prompt_length": by_length,
        "exact_tokens": total("exact"),
        "reused_tokens": total("reused"),
        "recomputed_tokens": total("recomputed"),
        "fresh_tokens": total("fresh"),
        "kl_mean": round(statistics.fmean(c.kl for c in measured), 6),
        "kl_max": round(max(c.kl for c in measured), 6),
        "kl_noise_floor": round(statistics.fmean(abs(c.noise) for c in measured), 12),
        "first_token_agreement": statistics.fmean(c.on.token_ids[0] == c.off.token_ids[0] for c in measured),
        "greedy_token_agreement": round(
            statistics.fmean(a == b for c in measured for a, b in zip(c.off.token_ids, c.on.token_ids, strict=False)),
            4,
        ),
    }


def _closing(result: dict, folder: Path) -> str:
    low, high = result["ttft_ratio_range"]
    lines = (
        "",
        "                               reuse off   reuse on",
        "  time to first token, median  {ttft_off_s_median:7.2f} s  {ttft_on_s_median:7.2f} s",
        "  ratio                        {ttft_ratio_median:.2f} (from {low:.2f} to {high:.2f}); "
        "limit {limit_median:.2f}, {share_of_limit_median:.0%} of it reached",
        "  prompt tokens                exact {exact_tokens}, reused {reused_tokens} "
        "(recomputed {recomputed_tokens}), fresh {fresh_tokens}",
        "  answers                      KL to full prefill {kl_mean:.4f} nats "
        "(noise floor {kl_noise_floor:.1e}), first token agrees in {first_token_agreement:.0%}",
        "",
        f"  written: {folder / 'demo.json'}, {folder / 'demo.png'}",
    )
    return "\n".join(lines).format(**result, low=low, high=high)


def _picture(measured: list[Case], result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, origins) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    where = range(len(measured))
    times.bar([x - 0.2 for x in where], [c.off.ttft_s for c in measured], 0.4, label="reuse off", color="#9aa5b1")
    times.bar([x + 0.2 for x in where], [c.on.ttft_s for c in measured], 0.4, label="reuse on", color="#2a7de1")
    for x, case in zip(where, measured, strict=True):
        times.text(x + 0.2, case.on.ttft_s, f"{case.ratio:.1f}x", ha="center", va="bottom", fontsize=8)
    times.set_ylabel("time to first token (s)")
    times.set_title(f"median {result['ttft_ratio_median']:.1f}x faster, KL {result['kl_mean']:.3f} nats")
    times.legend()

    bottom = [0] * len(measured)
    parts = (
        ("exact prefix", "#4caf7a", lambda r: r["exact"]),
        ("reused as it is", "#2a7de1", lambda r: r["reused"] - r["recomputed"]),
        ("reused, recomputed", "#f2a33a", lambda r: r["recomputed"]),
        ("fresh", "#d6455d", lambda r: r["fresh"]),
    )
    for label, color, count in parts:
        heights = [count(c.on.report) for c in measured]
        origins.bar(where, heights, 0.6, bottom=bottom, label=label, color=color)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    origins.set_ylabel("prompt tokens")
    origins.set_title("where every prompt token came from")
    origins.legend(loc="upper left")
    for axis in (times, origins):
        axis.set_xticks(list(where), [str(c.prompt_tokens) for c in measured], fontsize=8)
        axis.set_xlabel("prompt length (tokens)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
