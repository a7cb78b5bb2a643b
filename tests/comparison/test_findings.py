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


def is_rounded(text, value):
    """Whether the digits of ``text`` are those of ``value`` to half a unit of the last, or of its hundredfold."""
    half = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    return any(abs(abs(float(text)) - abs(scale * value)) <= half for scale in (1, 100))


def is_told(texts, ends):
    """Whether an interval is told, as it is or with its sign changed (how far something lies below)."""
    value, low, high = ends
    return any(all(map(is_rounded, texts, one)) for one in (ends, (value, high, low)))


@pytest.mark.parametrize("name", FINDINGS)
def test_every_figure_of_the_findings_is_in_the_pages_they_are_of(name):
    files = [RESULTS / f"{page}.json" for page in {name, *re.findall(r"`(\w+)`", FINDINGS[name])}]
    pages = [file.read_text() for file in files if file.is_file()]
    suite = (SUITES / f"{name}.yaml").read_text()
    known = [float(text) for text in re.findall(NUMBER, "".join([*pages, suite]))]
    missing = [text for text in re.findall(NUMBER, FINDINGS[name]) if not any(is_rounded(text, x) for x in known)]
    assert not missing
    found = [ends for page in pages for ends in intervals(json.loads(page))]
    ranges = re.findall(rf"({NUMBER})[ %]*[(,]\s*({NUMBER})\s+to\s+({NUMBER})", FINDINGS[name])
    assert ranges
    assert not [one for one in ranges if not any(is_told(one, ends) for ends in found)]
