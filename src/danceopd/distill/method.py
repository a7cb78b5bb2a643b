"""What a training method is to everything around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from danceopd.distill.routing import Route, Router
from danceopd.distill.schedule import Grid
from danceopd.states import ExpectedCalls, StepResult


class Method(Protocol):
    """DanceOPD, or a baseline: the loss of one update, and what it costs."""

    @property
    def routes(self) -> Sequence[Route]: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def device(self) -> torch.device | str: ...

    @property
    def router(self) -> Router: ...

    def expected_calls(self) -> ExpectedCalls:
        """Network calls that one training sample costs, in expectation."""
        ...

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """See ``DanceOPD.step``."""
        ...
