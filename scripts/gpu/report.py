"""A table and a picture of what the stages left behind: report.md and ttft.png beside the result files."""

from __future__ import annotations

import json
from pathlib import Path

TIMES = ("model_shape", "engine", "prompt_tokens", "ratio", "ttft_off_s", "ttft_on_s", "ttft_ratio", "share_of_limit")
KERNELS = ("model_shape", "kernel", "rows", "layout", "prompt_tokens", "seconds", "gb_s", "tflop_s", "share_of_limit")
QUALITY = ("model_shape", "kl_mean", "kl_max", "kl_noise_floor", "first_token_agreement")


def table(columns: tuple[str, ...], rows: list[dict]) -> list[str]:
    """Markdown lines; a value that a row does not have stays empty."""

    def shown(value) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]


def write(folder: Path) -> None:
    """Read every result file of the folder, write the report; without any there is none."""
    stages = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not stages:
        return
    lines = ["# GPU check", ""]
    for stage in stages:
        versions = ", ".join(f"{k} {v}" for k, v in stage["versions"].items() if v)
        whole = "complete" if stage["complete"] else "cut short"
        lines += [f"## {stage['stage']} ({whole})", "", f"{stage['device']['name']}; {versions}", ""]
        lines += [f"{name}: {value}  " for name, value in stage["settings"].items()] + [""]
        results = stage["results"]
        for columns, mark in ((TIMES, "ttft_ratio"), (KERNELS, "kernel"), (QUALITY, "kl_mean")):
            if rows := [r for r in results if mark in r]:
                lines += [*table(columns, rows), ""]
        others = [r for r in results if "ttft_ratio" not in r and "kernel" not in r]
        lines += [f"- {', '.join(f'{k}: {v}' for k, v in r.items())}" for r in others] + [""]
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    picture(folder / "ttft.png", [r for s in stages for r in s["results"] if "ttft_ratio" in r])


def picture(file: Path, rows: list[dict]) -> None:
    """Time to first token by prompt length, off and on, one panel a model shape and engine."""
    panels = sorted({(r["model_shape"], r["engine"]) for r in rows})
    if not panels:
        return
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib, so no picture")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (shape, engine) in zip(axes[0], panels, strict=True):
        mine = [r for r in rows if (r["model_shape"], r["engine"]) == (shape, engine)]
        off = sorted({(r["prompt_tokens"], r["ttft_off_s"]) for r in mine})
        axis.plot(*zip(*off, strict=True), "o-", color="0.4", label="reuse off")
        for ratio in sorted({r["ratio"] for r in mine}):
            on = sorted((r["prompt_tokens"], r["ttft_on_s"]) for r in mine if r["ratio"] == ratio)
            axis.plot(*zip(*on, strict=True), "o-", label=f"on, ratio {ratio:g}")
        axis.set(xscale="log", yscale="log", title=f"{shape} ({engine})", xlabel="prompt tokens")
    axes[0][0].set_ylabel("time to first token, s")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
