"""The Markdown files: links lead somewhere, lines and the README are short, generated files are up to date."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_FOLDERS = ("benchmarks", "dashboards", "docs", "findings", "kernels", "kvshare_sched", "radix_ext", "scripts", "tests")
# Written by `kvshare bench`, `kvshare eval` and dashboards/generate.py; their tables follow the data.
_MADE = set((ROOT / "benchmarks").rglob("report.md")) | {ROOT / "dashboards" / "metrics.md"}
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.md"))])
WRITTEN = [page for page in PAGES if page not in _MADE]
_STARTS = (
    "kvshare_sched",
    "kvshare_sched/engine/sglang",
    "radix_ext",
    "kernels/kvshare_kernels",
    "tests",
    "tests/unit",
    "scripts",
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, spaces to hyphens, punctuation dropped."""
    text = _FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _broken(page: Path) -> list[str]:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _follows_the_tree(page: Path) -> bool:
    """Not the records of what was decided and changed once, and what was found in other packages."""
    return page.name != "CHANGELOG.md" and not {"decisions", "findings"} & set(page.parts)


def _missing(page: Path) -> list[str]:
    """Python files in backquotes that are nowhere: neither beside the page nor in one of our folders."""
    starts = (page.parent, ROOT, *(ROOT / start for start in _STARTS))
    named = re.findall(r"`([\w./*-]+\.(?:py|cuh))`", page.read_text())
    return [name for name in named if not any(any(start.glob(name)) for start in starts)]


def _load_script():
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_somewhere(page):
    assert _broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: `x`\n[a](#a-title-x) [b](#missing) [c](gone.md) [d](https://example.org/gone)\n")
    assert _broken(page) == ["#missing", "gone.md"]


@pytest.mark.parametrize("page", [page for page in WRITTEN if _follows_the_tree(page)], ids=_name)
def test_named_files_exist(page):
    assert _missing(page) == []


def test_a_file_that_is_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`settings.py`, `kvshare_sched/settings.py`, `unit/docs/test_docs.py`, `gone.py`, `tests/gone_*.py`\n"
    )
    assert _missing(page) == ["gone.py", "tests/gone_*.py"]


@pytest.mark.parametrize("page", WRITTEN, ids=_name)
def test_lines_have_160_characters_at_most(page):
    assert [line for line in page.read_text().splitlines() if len(line) > 160] == []


def test_the_readme_is_an_entrance():
    assert len((ROOT / "README.md").read_text()) <= 6_000


def test_settings_md_is_what_the_script_writes():
    for path, text in _load_script().files().items():
        assert path.read_text() == text, "run `python scripts/write_docs.py`"


def test_every_decision_is_in_the_table_with_its_status():
    folder = ROOT / "docs" / "decisions"
    table = (folder / "README.md").read_text()
    records = sorted(folder.glob("[0-9]*.md"))
    rows = []
    for record in records:
        lines = record.read_text().splitlines()
        number, title = re.fullmatch(r"# (\d{3})\. (.*)", lines[0]).groups()
        assert record.name.startswith(f"{number}-")
        assert re.fullmatch(r"- Date: \d{4}-\d\d-\d\d", lines[2])
        status = lines[3].removeprefix("- Status: ")
        assert status.startswith("accepted") or re.fullmatch(r"superseded by \d{3}", status)
        rows.append(f"| [{number}]({record.name}) | {title} | {status} |")
    assert len(rows) == len({row[:7] for row in rows})
    assert [line for line in table.splitlines() if line.startswith("| [")] == rows
