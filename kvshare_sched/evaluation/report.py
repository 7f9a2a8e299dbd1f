"""Writes `report.json`, `report.md` and `frontier.png` from the figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from kvshare_sched.evaluation.figures import CELL_TOLERANCE, assemble


def made_with() -> dict:
    """What a result file says of the software and the machine it was made with; nothing in it depends on the day."""
    return {
        "versions": {n: version(n) for n in ("kvshare-sched", "sglang", "torch", "transformers", "numpy")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def write_json(folder: Path, content: dict) -> None:
    """Write `report.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "report.json.part"
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, folder / "report.json")


def write_all(folder: Path, settings: dict, rows: Sequence[dict]) -> str:
    """All three files; returns what to print."""
    result = assemble(settings, rows)
    write_json(folder, result)
    (folder / "report.md").write_text(markdown(result))
    picture(result, folder / "frontier.png")
    return f"\n{_summary_table(result['summary'])}\n\nwritten: {folder}/report.json, report.md, frontier.png"


def progress(row: dict) -> str:
    """One case in one line."""
    full = row["methods"]["full"]
    own = row["methods"].get("default") or full
    score = "-" if full["task_score"] is None else f"{full['task_score']:.2f} {own['task_score']:.2f}"
    return (
        f"{row['name']:<16} {row['donor_kind']:<10} {row['prompt_tokens']:5} tokens  score {score}  KL {own['kl']:.4f}"
    )


def markdown(result: dict) -> str:
    """`report.md`: the tables, and what the words in them mean."""
    settings = result["settings"]
    parts = [
        f"# Answer quality of reuse: {settings['model']}",
        f"{settings['cases']} cases ({', '.join(settings['tasks'])}), {settings['donors']} earlier contexts a "
        "document, "
        f"answers of at most {settings['answer_tokens']} tokens, seed {settings['seed']}. "
        "Reference: full prefill on the same server. Server: `" + settings["server_settings"] + "`.",
        "## All cases",
        _summary_table(result["summary"]),
        _NOTES,
        "## Against the published rules",
        table(
            ("method", "against", "KL ratio", "typical", "95 % interval", "cells, difference", "no more", "time ratio"),
            [
                (
                    c["method"],
                    c["against"],
                    f"{c['kl_ratio']:.2f}",
                    f"{c['kl_ratio_typical']:.2f}",
                    f"{c['kl_ratio_low']:.2f} to {c['kl_ratio_high']:.2f}",
                    f"{c['cell_difference']:+.1%}",
                    "yes" if c["no_more_cells"] else "no",
                    f"{c['time_ratio']:.2f}",
                )
                for c in result["comparison"]
            ],
        ),
        "KL ratio: of the means, below 1 where the first is closer to full prefill. Typical: geometric mean of the "
        "paired ratios, with its interval; one that holds 1 means that no difference was detected, not that there is "
        f"none. No more: the first computes no more cells than the second, within {CELL_TOLERANCE:.0%}. Time ratio: "
        "median of the paired times to first token, below 1 where the first is faster. Nothing is interpolated.",
    ]
    for key, title in (("by_task", "By task"), ("by_donor_kind", "By kind of donor")):
        parts.append(f"## {title}")
        for measure, label, form in (("task_score", "task score", "{:.2f}"), ("kl_mean", "KL mean, nats", "{:.4f}")):
            split = result[key]
            body = [(name, *(cell(split[part][name][measure], form) for part in split)) for name in result["summary"]]
            parts.append(table((label, *split), body))
    return "\n\n".join(parts) + "\n"


_NOTES = (
    "KL: mean, median and 90th percentile over the cases of KL(full || method) in nats, teacher forced over full "
    "prefill's own greedy answer. The request that measures it holds the answer, so a score that looks from the end "
    "of the prompt looks from the answer there; `KL first` is of the first answer token alone, in a request without "
    "it. Top 1: how often the method's likeliest token is full prefill's. Score: 0..1; gap: full minus method, "
    "paired 95 % bootstrap. Recovered: (score - no context) / (full - no context). Swaps: answers that name an "
    "entity only a donor has. Cells: computed (layer x token) cells of the reused tokens over all of theirs. TTFT "
    "and TPOT: medians, one request at a time."
)


_CLOSENESS = (
    ("cells", "computed_cells", "{:.1%}"),
    ("KL mean", "kl_mean", "{:.4f}"),
    ("median", "kl_median", "{:.4f}"),
    ("p90", "kl_p90", "{:.4f}"),
    ("KL first", "kl_first_mean", "{:.4f}"),
    ("first token", "first_token_agreement", "{:.0%}"),
    ("top 1", "greedy_agreement", "{:.1%}"),
    ("TTFT s", "ttft_s", "{:.3f}"),
    ("full/own", "ttft_ratio", "{:.2f}"),
    ("TPOT s", "tpot_s", "{:.4f}"),
)
_ANSWERS = (
    ("score", "task_score", "{:.3f}"),
    ("gap", "task_score_gap", "{:+.3f}"),
    ("low", "task_score_gap_low", "{:+.3f}"),
    ("high", "task_score_gap_high", "{:+.3f}"),
    ("recovered", "gap_recovered", "{:.2f}"),
    ("swaps", "swaps", "{}"),
    ("reused", "reused_cases", "{}"),
    ("cases", "cases", "{}"),
)


def _summary_table(summary: dict[str, dict]) -> str:
    """Two tables: how close and how fast, then how good."""
    tables = []
    for form in (_CLOSENESS, _ANSWERS):
        rows = [(name, *(cell(figures[key], f) for _, key, f in form)) for name, figures in summary.items()]
        tables.append(table(("method", *(title for title, _, _ in form)), rows))
    return "\n\n".join(tables)


def cell(value, form: str) -> str:
    """A figure in that form, a dash where nothing was measured."""
    return "-" if value is None else form.format(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]

    def line(cells) -> str:
        first, *rest = (str(c) for c in cells)
        return (
            f"| {first:<{widths[0]}} | " + " | ".join(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True)) + " |"
        )

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([line(head), rule, *(line(r) for r in rows)])


def picture(result: dict, path: Path) -> None:
    """KL against computed cells and against the TTFT ratio, one line a family of methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families: dict[str, list[dict]] = {}
    for name, method in result["settings"]["methods"].items():
        families.setdefault(method["family"], []).append(result["summary"][name])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    views = (
        ("computed_cells", "computed cells of the reused tokens"),
        ("ttft_ratio", "TTFT of full prefill / TTFT of the method"),
    )
    for axis, (key, label) in zip(axes, views, strict=True):
        for family, points in families.items():
            ordered = sorted(points, key=lambda p: p["computed_cells"])
            style = {"marker": "*", "markersize": 12} if family == "default" else {"marker": "o"}
            axis.plot([p[key] for p in ordered], [p["kl_mean"] for p in ordered], label=family, **style)
        axis.set_xlabel(label)
        axis.set_ylabel("mean KL to full prefill (nats)")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend()
    axes[0].set_title(f"{result['settings']['model']}, {result['settings']['cases']} cases")
    figure.savefig(path, dpi=110)
    plt.close(figure)
