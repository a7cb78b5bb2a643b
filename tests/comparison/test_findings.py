"""What docs/results/README.md says is what its pages hold."""

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


def told_apart(content):
    """What a page holds that is not an interval: detectable effects, and series by step."""
    if isinstance(content, dict):
        yield from [content["detectable"]] if content.get("detectable") is not None else []
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from [value] if isinstance(content, list) and isinstance(value, float) else told_apart(value)


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
    """Whether an interval is told, as it is or from the other side (how far something lies below)."""
    value, low, high = ends
    return any(all(map(is_rounded, texts, one)) for one in (ends, (-value, -high, -low)))


def told_intervals(text):
    return re.findall(rf"({NUMBER})[ %]*[(,]\s*({NUMBER})\s+to\s+({NUMBER})", text)


@pytest.mark.parametrize("name", FINDINGS)
def test_every_figure_of_the_findings_is_in_the_pages_they_are_of(name):
    files = [RESULTS / f"{page}.json" for page in {name, *re.findall(r"`(\w+)`", FINDINGS[name])}]
    pages = [file.read_text() for file in files if file.is_file()]
    suite = (SUITES / f"{name}.yaml").read_text()
    found = [ends for page in pages for ends in intervals(json.loads(page)) if None not in ends]
    known = [float(text) for text in re.findall(NUMBER, suite)] + [x for ends in found for x in ends]
    known += [x for page in pages for x in told_apart(json.loads(page))]
    known += tried(SUITES / f"{name}.search.json")
    known += [-x for x in known]
    missing = [text for text in re.findall(NUMBER, FINDINGS[name]) if not any(is_rounded(text, x) for x in known)]
    assert not missing
    ranges = told_intervals(FINDINGS[name])
    assert ranges
    assert not [one for one in ranges if not any(is_told(one, ends) for ends in found)]


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
