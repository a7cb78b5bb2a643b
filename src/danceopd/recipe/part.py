"""What all parts of a recipe share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Part(BaseModel):
    """Strict: unknown keys fail, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def number(**limits: Any) -> Any:
    """A finite float's pydantic field."""
    return Field(allow_inf_nan=False, **limits)


MAX_SEED = 2**32 - 1


def seed_field(description: str) -> Any:
    """A seed's pydantic field, 0 by default."""
    return Field(default=0, ge=0, le=MAX_SEED, description=description)


def _sides(value: Any) -> Any:
    """One number stands for both sides; YAML has lists."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return tuple(value)
    raise ValueError(f"needs height and width, [768, 1024], or one number for a square, found {value!r}")


Side = Annotated[int, Field(ge=1)]
Resolution = Annotated[tuple[Side, Side], BeforeValidator(_sides, json_schema_input_type=int | tuple[int, int])]
"""Height and width in pixels; one number for a square."""
