"""What docs/results/README.md says is what its pages hold: slips of the pen fail here.

An interval must be one of the pages'; a single number, only a mean or a detectable effect that is somewhere in them, so
that a figure of another row may pass.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS, SUITES = ROOT / "docs" / "results", ROOT / "suites"
SECTIONS = re.split(r"^## \[(\w+)\]\(\1\.md\)$", (RESULTS / "README.md").read_text().split("\n## Raw")[0], flags=re.M)
FINDINGS = dict(zip(SECTIONS[1::2], SECTIONS[2::2], strict=True))
NUMBER = r"[-+]?\d+\.\d+(?:e-\d)?"


def intervals(content):
    if isinstance(content, dict) and {"value", "low", "high"} <= content.keys():
        yield content["value"], content["low"], content["high"]
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from intervals(value)


def means(content, of_series=False):
    """What a page says with one number: means, detectable effects, and series by step and by student."""
    if isinstance(content, dict):
        for key, value in content.items():
            alone = key in ("value", "detectable") and value is not None
            yield from [value] if alone else means(value, of_series or key in ("at_step", "by_seed"))
    elif isinstance(content, list):
        for value in content:
            yield from [value] if of_series and isinstance(value, float) else means(value, of_series)


def tried(file):
    """The scores of a search's trials, where there was one."""
    methods = json.loads(file.read_text())["methods"].values() if file.is_file() else ()
    trials = [trial for method in methods for trial in method["trials"] + method.get("finals", [])]
    return [score for trial in trials for score in trial["scores"].values()]


def is_rounded(text, value):
    """Whether ``text`` is ``value``, or its hundredfold, to half a unit of its last digit."""
    half = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    return any(abs(float(text) - scale * value) <= half for scale in (1, 100))


def is_told(texts, ends):
    """Whether an interval, or its two ends, is told: as it is, or from the other side (how far something is below)."""
    *value, low, high = ends
    return any(all(map(is_rounded, texts, one)) for one in (ends, (*(-x for x in value), -high, -low)))


INTERVAL = rf"({NUMBER})[ %]*[(,]\s*({NUMBER})\s+to\s+({NUMBER})"
ENDS = rf"\(({NUMBER})\s+to\s+({NUMBER})\)"
"""An interval whose mean is told elsewhere."""


def told_intervals(text):
    return re.findall(INTERVAL, text)


@pytest.mark.parametrize("name", FINDINGS)
def test_every_figure_of_the_findings_is_in_the_pages_they_are_of(name):
    text, suite = FINDINGS[name], (SUITES / f"{name}.yaml").read_text()
    files = [RESULTS / f"{page}.json" for page in {name, *re.findall(r"`(\w+)`", text)}]
    pages = [json.loads(file.read_text()) for file in files if file.is_file()]
    found = [ends for page in pages for ends in intervals(page) if None not in ends]
    assert told_intervals(text)
    assert not [one for one in told_intervals(text) if not any(is_told(one, ends) for ends in found)]
    text = re.sub(INTERVAL, "", text)
    assert not [one for one in re.findall(ENDS, text) if not any(is_told(one, ends[1:]) for ends in found)]
    known = [float(number) for number in re.findall(NUMBER, suite)] + tried(SUITES / f"{name}.search.json")
    known += [x for page in pages for x in means(page)]
    left = re.findall(NUMBER, re.sub(ENDS, "", text))
    assert not [number for number in left if not any(is_rounded(number, x) or is_rounded(number, -x) for x in known)]


@pytest.mark.parametrize("file", ["README.md", "docs/method.md"])
def test_every_interval_beside_a_link_to_a_page_is_of_that_page(file):
    seen = 0
    for paragraph in (ROOT / file).read_text().split("\n\n"):
        pages = {RESULTS / f"{name}.json" for name in re.findall(r"results/(\w+)\.md", paragraph)}
        found = [ends for page in pages if page.is_file() for ends in intervals(json.loads(page.read_text()))]
        told = told_intervals(paragraph) if found else []
        assert not [one for one in told if not any(None not in ends and is_told(one, ends) for ends in found)]
        seen += len(told)
    assert seen
