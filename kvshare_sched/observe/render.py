"""Tables as plain text and as HTML that needs nothing but itself; the prompt as a coloured bar."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Section = tuple[str, tuple[str, ...], list[tuple]]
_COLOURS = {"exact": ("#3b8f5a", 42), "reused": ("#e09a2b", 43), "fresh": ("#8d99a6", 47), "unlisted": ("#d9dee3", 40)}
_BAR = 100  # characters

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>{refresh}
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 70em; padding: 0 1em; color: #1f2933 }}
h1 {{ font-size: 1.3em }} h2 {{ font-size: 1.05em; margin: 1.4em 0 .3em }}
table {{ border-collapse: collapse }}
td, th {{ padding: .15em 1em .15em 0; text-align: left; border-bottom: 1px solid #e4e7eb; vertical-align: top }}
.bar {{ display: flex; height: 2.2em; border: 1px solid #cbd2d9 }}
.bar span {{ min-width: 1px }}
.key {{ padding: .1em .7em; margin-right: .5em; color: #fff }}
.tables {{ display: flex; flex-wrap: wrap; gap: 0 3.5em }}
{colours}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def html_page(title: str, body: str, refresh_s: int | None = None) -> str:
    """A whole page. refresh_s: the browser asks again after so many seconds."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    colours = "\n".join(f".{name} {{ background: {colour} }}" for name, (colour, _) in _COLOURS.items())
    return _PAGE.format(title=escape(title), refresh=refresh, colours=colours, body=body)


def html_tables(sections: Sequence[Section]) -> str:
    """All sections, one table each; empty ones are left out."""
    tables = "\n".join(_html_table(*section) for section in sections if section[2])
    return f'<div class="tables">\n{tables}\n</div>'


def _html_table(title: str, heads: tuple[str, ...], rows: list[tuple]) -> str:
    head = f"<tr>{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr>" if any(heads) else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
    return f"<section><h2>{escape(title)}</h2>\n<table>{head}\n{body}</table></section>"


def html_bar(runs: Sequence[dict]) -> str:
    """The prompt from its first token to its last, in colours."""
    parts = (
        f'<span class="{r["origin"]}" style="flex:{r["length"]}" '
        f'title="{r["origin"]}: {r["start"]} to {r["start"] + r["length"]}"></span>'
        for r in runs
    )
    keys = (f'<span class="key {o}">{o}</span>' for o in dict.fromkeys(r["origin"] for r in runs))
    return f'<div class="bar">{"".join(parts)}</div><p>{"".join(keys)}</p>'


def html_links(title: str, links: Sequence[tuple[str, str]]) -> str:
    """(address, text) as a list."""
    items = "".join(f'<li><a href="{escape(to, quote=True)}">{escape(text)}</a></li>' for to, text in links)
    return f"<h2>{escape(title)}</h2><ul>{items}</ul>" if links else ""


def text_tables(sections: Sequence[Section]) -> str:
    """The same for a terminal."""
    return "\n\n".join(_text_table(*section) for section in sections if section[2])


def _text_table(title: str, heads: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [tuple(map(_plain, row)) for row in ([heads] if any(heads) else []) + list(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    body = ("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((title, *body))


def _plain(cell: object) -> str:
    """Clients choose ids and names: none of them may speak to the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(cell))


def text_bar(runs: Sequence[dict], colour: bool) -> str:
    """The same for a terminal: a letter for so many tokens (e, r, f; the origin that has most of them)."""
    end = runs[-1]["start"] + runs[-1]["length"] if runs else 0
    cells = []
    for i in range(min(_BAR, end)):
        low, high = i * end / min(_BAR, end), (i + 1) * end / min(_BAR, end)
        cells.append(max(runs, key=lambda r: min(high, r["start"] + r["length"]) - max(low, r["start"]))["origin"])
    if not colour:
        return "".join(origin[0] for origin in cells)
    return "".join(f"\033[{_COLOURS[origin][1]}m{origin[0]}" for origin in cells) + "\033[0m"
