"""Claims: the range that each states, and its verdict by the interval."""

import pytest
from tiny_suites import write

from danceopd.comparison.claims import settle, verdict
from danceopd.comparison.suite import load_suite

VALUE = {"text": "as the edit source", "measure": "scores", "at": "views/updates/danceopd/edit/of_best_source"}


def test_verdicts_follow_the_interval():
    assert [verdict(low, high, above=0.0) for low, high in ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.1))] == [
        "reproduced",
        "not reproduced",
        "inconclusive",
    ]
    assert verdict(0.0, 0.0, above=0.0) == "not reproduced"
    assert verdict(1.0, 1.0, at_least=1.0) == "reproduced"
    law = {"at_least": 0.9, "at_most": 1.1}
    assert [verdict(low, high, **law) for low, high in ((0.95, 1.05), (1.2, 1.3), (1.0, 1.2), (0.5, 1.5))] == [
        "reproduced",
        "not reproduced",
        "inconclusive",
        "inconclusive",
    ]


@pytest.mark.parametrize(
    ("bound", "said", "verdicts"),
    [
        ({"at_least": -0.5}, "at least -0.5", ("not reproduced", "inconclusive", "reproduced", "reproduced")),
        ({"at_most": 1.0}, "at most 1", ("reproduced", "reproduced", "reproduced", "inconclusive")),
        ({"at_most": 0.0}, "at most 0", ("reproduced", "inconclusive", "inconclusive", "not reproduced")),
        ({"between": [0, 1]}, "between 0 and 1", ("not reproduced", "inconclusive", "inconclusive", "inconclusive")),
    ],
)
def test_a_value_is_held_to_the_bounds_that_its_claim_sets_and_no_others(tmp_path, bound, said, verdicts):
    suite = load_suite(write(tmp_path, claims=[VALUE | bound]))
    for (low, high), expected in zip(((-2.0, -1.0), (-1.0, 0.2), (-0.2, 0.8), (0.9, 1.1)), verdicts, strict=True):
        estimate = {"value": (low + high) / 2, "low": low, "high": high, "detectable": 0.1}
        measures = {"scores": {"views": {"updates": {"danceopd": {"edit": {"of_best_source": estimate}}}}}}
        (claim,) = settle(suite, None, measures)
        assert (claim["holds"], claim["verdict"]) == (said, expected)
