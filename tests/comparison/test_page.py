"""A comparison's page: verdicts by the interval, and every word from the JSON."""

import json

import pytest

from danceopd.comparison.claims import verdict
from danceopd.comparison.compare import write_pages
from danceopd.comparison.page import html, markdown
from danceopd.comparison.runner import ComparisonError


def estimate(value, width=0.02):
    return {"value": value, "low": value - width, "high": value + width, "detectable": 0.03}


def synthetic():
    """A comparison's JSON by hand: two methods, one capability, one claim of each verdict."""
    scores = {
        "reference": "danceopd",
        "best_source": {"edit": "expert"},
        "paper": {"what": "", "figures": {"danceopd": "5.347"}},
        "sources": {"expert": {"edit": estimate(0.9)}},
        "views": {"updates": {}},
        "curve": {},
        "runs": {},
    }
    for name, value in (("danceopd", 0.8), ("joint", 0.7)):
        spent = {"updates": 10, "compute": 1200.0, "seconds": 3.0}
        found = {
            "overall": estimate(value),
            "tasks": {"subject-add": estimate(value)},
            "of_best_source": estimate(value / 0.9),
        }
        if name != "danceopd":
            found["minus_reference"] = estimate(value - 0.8)
        scores["views"]["updates"][name] = {**spent, "expected_compute": 1234.0, "edit": found}
        scores["curve"][name] = [{**spent, "edit": estimate(value)}]
    claims = [
        {
            "text": f"claim {index}",
            "paper": "+8.1 %" if index < 3 else None,
            "holds": "above 0",
            "kind": "difference",
            "estimate": estimate(value) | {"detectable": 0.029},
            "relative": estimate(value / 0.7),
            "verdict": verdict(value - 0.02, value + 0.02, above=0.0),
        }
        for index, value in enumerate((0.1, -0.1, 0.01, 0.1, -0.1))
    ]
    return {
        "kind": "comparison",
        "suite": "synthetic",
        "title": "Synthetic",
        "seeds": 2,
        "part": "seeds 0 to 1 of 5",
        "scenes_per_task": 5,
        "searched": {
            "rule": "The best.",
            "updates": 5,
            "trials": 4,
            "chosen": {"danceopd": {"query.band": "mid"}},
            "edges": {"danceopd": ["rate 0.5 is the highest"]},
        },
        "paper": "GEditBench",
        "measures": {"scores": scores},
        "claims": claims,
    }


def test_the_page_states_the_json_and_nothing_else(tmp_path):
    source = tmp_path / "comparison.json"
    source.write_text(json.dumps(synthetic()))
    page = write_pages(source, tmp_path / "results")
    text = page.read_text()
    assert page.name == "synthetic.md"
    assert (
        "| claim 0 | +8.1 % | +0.100 (+0.080 to +0.120), relative 14.3 % (12.3 to 16.3) | above 0 | reproduced |"
        in text
    )
    assert [text.count(f"| {said} |") for said in ("reproduced", "not reproduced", "holds", "does not hold")] == [1] * 4
    assert "A part of the suite: seeds 0 to 1 of 5." in text
    assert "| inconclusive (detectable: 0.029) |" in text
    assert "| **danceopd** | 10 | 1,200 | 1,234 | 3 | 0.800 (0.78 to 0.82) | 0.89 (0.87 to 0.91) |  | 5.347 |" in text
    assert "| danceopd | query.band: mid |" in text
    assert "so that better ones may lie beyond: danceopd: rate 0.5 is the highest." in text
    assert html(synthetic()).count("data:image/png;base64,") == 2  # no plane of one capability
    stored = page.with_suffix(".json")
    write_pages(stored, tmp_path / "results")
    assert (stored.exists(), page.read_text()) == (True, text)
    other = synthetic()
    other["measures"]["scores"]["views"]["updates"]["danceopd"]["edit"]["overall"]["value"] = 0.81
    assert markdown(other) != text
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ComparisonError, match=r"other\.json is not the JSON of a comparison"):
        write_pages(tmp_path / "other.json", tmp_path)
    del other["measures"]["scores"]["views"]["updates"]["joint"]["expected_compute"]
    source.write_text(json.dumps(other))
    with pytest.raises(
        ComparisonError, match=r"comparison\.json is damaged, or .* has no expected_compute; .*--resume"
    ):
        write_pages(source, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
