"""The pieces that the page is made of. Whatever comes from a run, which may be anything, is escaped here."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from align.report import figures
from align.report.methods import Method


def table(heads: Iterable[str], rows: Iterable[tuple[list[str], str]], kind: str = "") -> str:
    """`rows` are cells of HTML and a class."""
    head = "".join(f'<th scope="col">{text_of(name)}</th>' for name in heads)
    body = "".join(
        f"<tr{f' class={of}' if of else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for cells, of in rows
    )
    return f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def select(id_: str, label: str, options: Sequence[str], chosen: int, values: Sequence[str] | None = None) -> str:
    """A choice; `values` are the options' numbers if not given."""
    made = "".join(
        f'<option value="{values[i] if values else i}"{" selected" if i == chosen else ""}>{text_of(option)}</option>'
        for i, option in enumerate(options)
    )
    return f'<label>{label}<select id="{id_}">{made}</select></label>'


def figure_of(title: str, svg: str, note: str = "") -> str:
    """A figure under its title."""
    of = f"<small>{text_of(note)}</small>" if note else ""
    return f"<figure><figcaption>{text_of(title)}{of}</figcaption>{svg}</figure>"


def shortened(prompt: str) -> str:
    """A line of at most 70 characters."""
    line = " ".join(prompt.split())
    return line if len(line) <= 70 else f"{line[:69]}…"


def text_of(words: str) -> str:
    """Words that mean no markup."""
    return escape(words, quote=True)


def to_json(node: Any) -> str:
    """In a script element: no tag may end it."""
    return json.dumps(node, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def file_beside(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def named(method: Method) -> str:
    """A method's mark and label."""
    return f'<span class="method">{figures.key_of(method.number)}<span>{text_of(method.label)}</span></span>'
