"""Tables and pictures of a comparison, as values that both pages draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORDS = {
    "t2i": "text to image",
    "edit": "editing",
    "local": "local edits",
    "global": "global edits",
    "updates": "equal updates",
    "compute": "equal compute",
}
"""What a page calls capabilities and views."""

MISSING = ""


@dataclass(frozen=True)
class Table:
    """note stands below it; bold: the first cell of the row that is set off."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""
    bold: str | None = None


@dataclass(frozen=True)
class Plot:
    """A picture under a heading."""

    title: str
    png: bytes


def as_markdown(table: Table) -> str:
    """The table under a second-level heading, its note below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [[f"**{row[0]}**", *row[1:]] if row[0] == table.bold else list(row) for row in table.rows]
    lines = [f"## {table.title}", "", line(table.header), "|" + "---|" * len(table.header), *map(line, rows), ""]
    return "\n".join([*lines, table.note, ""] if table.note else lines)


def score(estimate: dict[str, float | None] | None) -> str:
    """``0.812 (0.77 to 0.86)``; nothing where there is no value."""
    return _cell(estimate, "{:.3f}", "{:.2f}")


def number(estimate: dict[str, float | None] | None) -> str:
    """``6.93 (6.81 to 7.05)``."""
    return _cell(estimate, "{:.2f}", "{:.2f}")


def signed(estimate: dict[str, float | None] | None) -> str:
    """``+0.034 (+0.010 to +0.058)``."""
    return _cell(estimate, "{:+.3f}", "{:+.3f}")


def percent(estimate: dict[str, float | None] | None) -> str:
    """``85.3 % (81.0 to 89.9)``."""
    if estimate is None:
        return MISSING
    scaled = {key: None if value is None else 100 * value for key, value in estimate.items()}
    return _cell(scaled, "{:.1f} %", "{:.1f}")


def _cell(estimate: dict[str, float | None] | None, value: str, bound: str) -> str:
    if estimate is None or estimate["value"] is None:
        return MISSING
    if estimate["low"] is None:
        return value.format(estimate["value"])
    return f"{value.format(estimate['value'])} ({bound.format(estimate['low'])} to {bound.format(estimate['high'])})"
