"""``danceopd compare``: a suite from its file to its pages."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from danceopd.comparison.page import html, markdown
from danceopd.comparison.runner import ComparisonError, run_suite
from danceopd.comparison.suite import load_suite
from danceopd.comparison.summary import summarise
from danceopd.files import write_text


def compare(
    path: Path,
    *,
    seeds: int | None = None,
    only: list[str] | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> Path:
    """Run a suite and write ``comparison.json``, ``.md`` and ``.html``; returns the folder that holds them.

    Raises:
        SuiteError, ComparisonError: see ``load_suite`` and ``run_suite``; also if the folder holds a comparison and
            ``resume`` is off.
    """
    suite = load_suite(path)
    folder = out or Path("runs/compare") / suite.name
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ComparisonError(f"{folder} already holds a comparison; go on with --resume, or choose another --out")
    console = Console()
    results = run_suite(suite, folder, seeds=seeds, only=only, report=lambda line: console.print(line, highlight=False))
    summary = summarise(suite, results)
    write_text(folder / "comparison.json", json.dumps(summary, indent=1) + "\n")
    write_pages(folder)
    return folder


def write_pages(folder: Path) -> None:
    """Write the two pages from ``comparison.json``."""
    summary = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    write_text(folder / "comparison.md", markdown(summary))
    write_text(folder / "comparison.html", html(summary))
