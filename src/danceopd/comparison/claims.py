"""Verdicts: each claim of a suite, held against the interval that was measured."""

from __future__ import annotations

import math
from typing import Any

from danceopd.comparison.measures import MEASURES
from danceopd.comparison.results import Results
from danceopd.comparison.statistics import Effect, as_json, paired_difference, paired_ratio
from danceopd.comparison.suite import Suite, SuiteError
from danceopd.comparison.suite_file import ClaimPart
from danceopd.comparison.tables import WORDS, Table, percent, signed

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
OF_OUR_OWN = {REPRODUCED: "holds", NOT_REPRODUCED: "does not hold"}
"""The words for claims that the paper does not make."""


def verdict(
    low: float, high: float, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> str:
    """By the interval alone: inside the claimed range, outside it, or across its edge."""
    if above < low and at_least <= low and high <= at_most:
        return REPRODUCED
    return NOT_REPRODUCED if high <= above or high < at_least or low > at_most else INCONCLUSIVE


def require_values(suite: Suite) -> None:
    """Refuse a claim whose ``at`` leads to none of the estimates that the suite will have, before anything is trained.

    Raises:
        SuiteError: naming the claim, and what there is.
    """
    for claim in suite.claims:
        if claim.measure is None:
            continue
        here: Any = MEASURES[claim.measure].estimates(suite)
        for part in str(claim.at).split("/"):
            if not isinstance(here, dict) or part not in here:
                known = ", ".join(here) if isinstance(here, dict) else "nothing below"
                raise SuiteError(f"suite {suite.name!r}, claim at {claim.at!r}: no {part!r} there; it has {known}")
            here = here[part]
        if isinstance(here, dict):
            raise SuiteError(
                f"suite {suite.name!r}, claim at {claim.at!r}: this is no estimate; it has {', '.join(here)}"
            )


def settle(suite: Suite, results: Results, measures: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with what was measured and its verdict, as JSON; None where its methods were left out."""
    settled = []
    for claim in suite.claims:
        if claim.measure is None:
            settled.append(_lead(claim, results))
        else:
            settled.append(_value(claim, measures))
    return settled


def stated(claim: ClaimPart) -> dict[str, Any]:
    """What is claimed, as JSON: text, paper, the range in words, and the kind of value that is to lie there."""
    if claim.measure is None:
        text = f"{claim.method} leads {claim.over}: {WORDS[str(claim.capability)]}, {WORDS[claim.view]}"
        return {"text": text, "paper": claim.paper, "holds": "above 0", "kind": "difference"}
    least, most = _bounds(claim)
    if most == math.inf:
        holds = f"at least {least:g}"
    elif least == -math.inf:
        holds = f"at most {most:g}"
    else:
        holds = f"between {least:g} and {most:g}"
    return {"text": claim.text, "paper": claim.paper, "holds": holds, "kind": "value"}


def _lead(claim: ClaimPart, results: Results) -> dict[str, Any]:
    method, over, capability, found = str(claim.method), str(claim.over), str(claim.capability), stated(claim)
    if method not in results.views or over not in results.views:
        return found | {"estimate": None, "relative": None, "verdict": None}
    one, other = (results.scores(name, results.views[name][claim.view], capability) for name in (method, over))
    difference = paired_difference(one, other)
    ratio = paired_ratio(one, other)
    relative = Effect(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.detectable)
    return found | {
        "estimate": as_json(difference),
        "relative": as_json(relative),
        "verdict": verdict(difference.low, difference.high, above=0.0),
    }


def _value(claim: ClaimPart, measures: dict[str, Any]) -> dict[str, Any]:
    least, most = _bounds(claim)
    found = stated(claim)
    estimate = _at(measures[str(claim.measure)], str(claim.at))
    low, high = (None, None) if estimate is None else (estimate["low"], estimate["high"])
    if low is None or high is None:
        return found | {"estimate": None, "relative": None, "verdict": None}
    return found | {
        "estimate": estimate,
        "relative": None,
        "verdict": verdict(low, high, at_least=least, at_most=most),
    }


def _bounds(claim: ClaimPart) -> tuple[float, float]:
    """The lowest and the highest value that a claim on a measured value allows; endless where it sets none."""
    if claim.between is not None:
        return claim.between
    return (
        -math.inf if claim.at_least is None else claim.at_least,
        math.inf if claim.at_most is None else claim.at_most,
    )


def _at(content: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The estimate at ``path``; None where it is of a method, or against a reference, that was left out."""
    here: dict[str, Any] | None = content
    for part in path.split("/"):
        here = None if here is None else here.get(part)
    return here


def table(claims: list[dict[str, Any]]) -> Table:
    """The verdicts."""
    rows = []
    for claim in claims:
        estimate = claim["estimate"]
        show = _shown(claim) if estimate else "not measured"
        said = claim["verdict"] or ""
        if claim["paper"] is None:
            said = OF_OUR_OWN.get(said, said)
        if said == INCONCLUSIVE:
            said += f" (detectable: {estimate['detectable']:.3f})"
        rows.append([claim["text"], claim["paper"] or "", show, claim["holds"], said])
    note = (
        "By the 95 % interval: reproduced (a claim that is not the paper's: holds) where all of it lies in the claimed "
        "range, not reproduced (does not hold) where all of it lies outside, else inconclusive, with the smallest "
        "effect that would be found with 80 % power. Whether a method leads is a matter of the difference's sign, "
        "whatever the size that the paper reports; the relative one beside it decides nothing."
    )
    return Table("Verdicts", ("claim", "paper", "measured", "holds if", "verdict"), rows, note)


def _shown(claim: dict[str, Any]) -> str:
    if claim["kind"] == "value":
        estimate = claim["estimate"]
        return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"
    relative = percent(claim["relative"])
    return signed(claim["estimate"]) + (f", relative {relative}" if relative else "")
