"""Off-policy distillation: the same objective against the routed field, at states that are not the student's."""

from __future__ import annotations

from typing import Literal

from danceopd.distill.step import DanceOPD


def off_policy(*, states: Literal["data", "teacher"] = "data", **options) -> DanceOPD:
    """``DanceOPD`` with the student's rollout replaced.

    states: ``"data"`` noises a real target image to the queried sigma; ``"teacher"`` takes the routed field's own
        rollout. options: those of ``DanceOPD``.

    Raises:
        ValueError: for other states.
    """
    if states not in ("data", "teacher"):
        raise ValueError(f"off-policy states are 'data' or 'teacher', found {states!r}")
    return DanceOPD(states=states, **options)
