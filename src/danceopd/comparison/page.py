"""``comparison.md`` and ``comparison.html``, and the picture that leads them, from ``comparison.json`` alone."""

from __future__ import annotations

import math
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from danceopd.comparison import claims
from danceopd.comparison.measures import MEASURES, scores
from danceopd.comparison.tables import Plot, Table, as_markdown
from danceopd.report.page import data_url


def markdown(summary: dict[str, Any], *, picture: str | None = None) -> str:
    """The verdicts, every measure's tables, and where the settings come from.

    picture: file of ``headline``, to stand above them.
    """
    blocks = [f"# {summary['title']}", "", *(line + "\n" for line in _lines(summary))]
    if picture is not None:
        blocks.append(f"![{scores.AGAINST_COMPUTE}]({picture})\n")
        blocks.append(f"{scores.AGAINST_COMPUTE}; {scores.PLACED}.\n")
    return "\n".join([*blocks, *map(as_markdown, _tables(summary))]).rstrip() + "\n"


def html(summary: dict[str, Any]) -> str:
    """One self-contained page: the same lines and tables below the headline, and all other pictures."""
    plots = _plots(summary)
    loader = PackageLoader("danceopd.report")
    environment = Environment(loader=loader, autoescape=select_autoescape())
    environment.filters["data_url"] = data_url
    page = environment.get_template("comparison.html")
    return page.render(title=summary["title"], lines=_lines(summary), tables=_tables(summary), plots=plots)


def headline(summary: dict[str, Any]) -> bytes:
    """The scores against the compute that they took: a PNG."""
    return scores.against_compute(summary["measures"]["scores"])


def _plots(summary: dict[str, Any]) -> list[Plot]:
    return [plot for name, content in summary["measures"].items() for plot in MEASURES[name].plots(content)]


def _tables(summary: dict[str, Any]) -> list[Table]:
    made = [claims.table(summary["claims"])] if summary["claims"] else []
    made += [table for name, content in summary["measures"].items() for table in MEASURES[name].tables(content)]
    if summary["searched"] is not None and summary["searched"]["chosen"]:
        made.append(_search_table(summary["searched"]))
    return made


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"{summary['seeds']} seed(s), {summary['scenes_per_task']} scenes per task; mean (95 % interval "
        + ("over seeds and scenes)." if summary["seeds"] > 1 else "over scenes; one seed says nothing of others).")
    ]
    if summary["seeds"] == 2:
        lines.append("Two seeds are few: where they agree by chance, the interval is too narrow (as few as 86 % hold).")
    if summary.get("part") is not None:
        lines.append(f"A part of the suite: {summary['part']}.")
    if summary["paper"] is not None:
        lines.append(f"The paper's figures (arXiv 2606.27377), on other models and benchmarks: {summary['paper']}.")
    if summary["searched"] is None:
        lines.append("No settings were searched: every method runs as its suite says.")
    return lines


def _as_yaml(settings: dict[str, Any]) -> str:
    """Settings on one line, as a suite's method takes them, without the braces."""
    return yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=math.inf).strip()[1:-1]


def _search_table(searched: dict[str, Any]) -> Table:
    rows = [[name, _as_yaml(chosen)] for name, chosen in searched["chosen"].items()]
    view = "compute" if searched["updates"] is None else "updates"
    final = searched.get(f"final_{view}")  # pages of older searches have none
    further = "" if final is None else f", the better half of them of {final:,.0f}"
    unit = "forward-equivalents" if view == "compute" else "updates"
    note = (
        f"{searched['trials']} trials of {searched[view]:,.0f} {unit} for each of these{further}, on seeds and scenes "
        f"apart from the reported ones. {searched['rule']}"
    )
    if searched["edges"]:
        said = "; ".join(f"{name}: {', '.join(edges)}" for name, edges in searched["edges"].items())
        note += f" At an end of what was tried, so that better ones may lie beyond: {said}."
    return Table("Settings chosen by the search", ("method", "settings"), rows, note)
