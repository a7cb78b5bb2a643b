"""``danceopd compare``, ``search`` and ``pages``: a suite from its file to its pages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from danceopd.comparison.claims import require_values
from danceopd.comparison.page import headline, html, markdown
from danceopd.comparison.runner import ComparisonError, run_suite
from danceopd.comparison.search import search as run_search
from danceopd.comparison.suite import Suite, load_suite, search_path
from danceopd.comparison.summary import KIND, PARTS, summarise
from danceopd.files import write_bytes, write_text

console = Console()


def compare(
    path: Path,
    *,
    seeds: int | None = None,
    only: list[str] | None = None,
    out: Path | None = None,
    resume: bool = False,
    jobs: int = 1,
) -> Path:
    """Run a suite and write ``comparison.json``, ``.md`` and ``.html`` into OUT/SUITE; returns the first.

    A part of the suite, by ``seeds`` or ``only``, becomes ``part.json``, ``.md`` and ``.html``, which says so.

    out: ``runs/compare`` by default. Its ``trained`` holds the runs, which suites with equal recipes share.
    jobs: runs at a time.

    Raises:
        SuiteError, ComparisonError: see ``load_suite`` and ``run_suite``; also if that folder holds a comparison and
            ``resume`` is off, the suite's search was not made yet, or ``seeds`` reach one that it used.
    """
    suite = load_suite(path)
    if suite.search is not None and suite.searched is None:
        raise ComparisonError(
            f"{path} declares a search and {search_path(path)} is not there; first: danceopd search {path}"
        )
    require_values(suite)
    part = _part(suite, seeds, only)
    if seeds is not None:
        suite = replace(suite, seeds=tuple(range(suite.seeds[0], suite.seeds[0] + seeds)))
    spent = sorted(set(suite.seeds) & set(suite.search.seeds if suite.search is not None else ()))
    if spent:
        raise ComparisonError(f"seed {spent[0]} chose the settings of suite {suite.name!r} and cannot be reported")
    out = out or Path("runs/compare")
    folder = _folder(out / suite.name, resume)
    results = run_suite(suite, out / "trained", only=only, jobs=jobs, report=_say)
    summary, stem = summarise(suite, results, part), "comparison" if part is None else "part"
    write_text(folder / f"{stem}.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / f"{stem}.md", markdown(summary))
    write_text(folder / f"{stem}.html", html(summary))
    return folder / f"{stem}.json"


def _part(suite: Suite, seeds: int | None, only: list[str] | None) -> str | None:
    left_out = [name for name in suite.recipes if only is not None and name not in only]
    words, first = [], suite.seeds[0]
    if seeds is not None and seeds < len(suite.seeds):
        words = [f"seeds {first} to {first + seeds - 1} of {len(suite.seeds)}"]
    words += [f"without {', '.join(left_out)}"] if left_out else []
    return "; ".join(words) or None


def search(path: Path, *, out: Path | None = None, resume: bool = False, jobs: int = 1) -> Path:
    """Search each method's settings as the suite declares; returns the file written beside it."""
    return run_search(path, _folder(out or Path("runs/search") / path.stem, resume), jobs=jobs, report=_say)


def write_pages(json_file: Path, folder: Path) -> Path:
    """Write a comparison's JSON, its page and its headline into ``folder``, as ``NAME.json``, ``NAME.md`` and
    ``NAME.png``; returns the page.

    Raises:
        ComparisonError: if the file is not a comparison's JSON, or lacks what a page says; nothing is written then.
    """
    summary = read_comparison(json_file)
    if summary is None:
        raise ComparisonError(f"{json_file} is not the JSON of a comparison")
    page = folder / f"{summary['suite']}.md"
    try:
        picture, text = headline(summary), markdown(summary, picture=f"{summary['suite']}.png")
    except KeyError as error:
        raise ComparisonError(
            f"{json_file} is damaged, or of an earlier version: it has no {error.args[0]}; danceopd compare --resume "
            "writes it anew, from the runs that are there"
        ) from error
    write_text(page.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
    write_bytes(page.with_suffix(".png"), picture)
    write_text(page, text)
    return page


def read_comparison(json_file: Path) -> dict[str, Any] | None:
    """The content of a comparison's JSON; None where the file is another's.

    Raises:
        ComparisonError: if it cannot be read, or is a comparison's and not all there.
    """
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ComparisonError(f"{json_file} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        return None
    missing = PARTS - content.keys()
    if missing:
        raise ComparisonError(f"{json_file} is damaged: it has no {', '.join(sorted(missing))}")
    return content


def _folder(folder: Path, resume: bool) -> Path:
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ComparisonError(f"{folder} already holds files; go on with --resume, or choose another --out")
    return folder


def _say(line: str) -> None:
    console.print(line, highlight=False)
