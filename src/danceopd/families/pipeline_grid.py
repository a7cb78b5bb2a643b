"""The sigma grid that a pipeline's own scheduler makes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

from danceopd.distill.schedule import Grid
from danceopd.fields.weights import WeightsError


def scheduler_grid(
    scheduler: Any, steps: int, *, shift: float | None, shape: tuple[int, ...] | None, passes_sigmas: bool
) -> Grid:
    """The grid of a pipeline with this scheduler, for 2 x 2 patches as tokens; the scheduler stays as it is.

    passes_sigmas: whether the pipeline hands the scheduler linspace(1, 1/N, N), or leaves it to the scheduler, which
        then starts from an already shifted smallest sigma.
    shape: of one latent [C, H, W]; needed where the scheduler's shift depends on the number of tokens.

    Raises:
        ValueError: if ``steps`` or ``shift`` is not positive, or the shape is needed and missing.
    """
    if steps < 1 or (shift is not None and shift <= 0):
        raise ValueError(f"a grid needs steps >= 1 and shift > 0, found steps {steps} and shift {shift}")
    own, config = copy.deepcopy(scheduler), scheduler.config
    options: dict[str, Any] = {}
    if config.use_dynamic_shifting:
        options["mu"] = _mu(config, shift, shape)
    elif shift is not None:
        own = type(scheduler).from_config(config, shift=shift)
    if passes_sigmas:
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    own.set_timesteps(steps, **options)
    return Grid(own.sigmas.detach().float().cpu())


def _mu(config: Any, shift: float | None, shape: tuple[int, ...] | None) -> float:
    """The scheduler's ``mu``: of a given shift, or linear in the number of tokens as the config says."""
    if shift is not None:
        return shift if config.time_shift_type == "linear" else math.log(shift)
    if shape is None:
        raise ValueError(
            "this pipeline's sigma grid depends on the size of the latents: pass shape=(C, H, W), or a shift"
        )
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + share * (config.max_shift - config.base_shift)


def require_euler(scheduler: Any, family: str) -> None:
    """Raise WeightsError unless the scheduler steps with Euler's method in sigma."""
    config = scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.stochastic_sampling or config.invert_sigmas:
        raise WeightsError(
            f"family {family!r} steps with Euler's method in sigma, as FlowMatchEulerDiscreteScheduler does without "
            f"stochastic_sampling and invert_sigmas; found {type(scheduler).__name__} with {dict(config)}"
        )
