"""Suites cut to seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "version": 1,
    "title": "tiny",
    "reference": "danceopd",
    "updates": 2,
    "compute": 108.0,
    "seeds": 1,
    "recipe": {
        "version": 1,
        "family": "shapes",
        "base": "shapes:base",
        "fields": {"t2i": {"base": True}, "edit": {"lora": "shapes:edit"}},
        "student": {"init": "edit"},
        "routes": [
            {"field": "t2i", "data": {"generator": "shapes/t2i"}},
            {"field": "edit", "data": {"generator": "shapes/edit"}},
        ],
        "rollout": {"num_inference_steps": 4},
        "train": {"batch_size": 4, "precision": "fp32", "sample_steps": 0},
        "evaluate": {"scenes_per_task": 2, "num_inference_steps": 2},
    },
    "methods": {
        "danceopd": {},
        "joint": {"method": "joint"},
        "merge": {
            "method": "weight_merge",
            "student": {"init": {"t2i": 1.0, "edit": 1.0}, "init_mode": "merged"},
            "train.steps": 0,
        },
    },
}

SEARCH: dict[str, Any] = {
    "updates": 1,
    "seeds": [7],
    "scenes_seed": 5,
    "scenes_per_task": 3,
    "capabilities": ["t2i", "edit"],
    "grid": {
        "danceopd": {"query.band": ["low_noise", "mid_noise"]},
        "joint": {"joint.sigma_mean": [0.0, 0.8]},
        "merge": {"student.init": [{"t2i": 1.0, "edit": 1.0}, {"t2i": 1.0, "edit": 2.0}]},
    },
}


def single_route(field: dict[str, Any], methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A suite of one route, taught by ``field`` on text-to-image prompts, from the base."""
    recipe = TINY["recipe"] | {
        "fields": {"teacher": field},
        "student": {"init": "base"},
        "routes": [{"field": "teacher", "data": {"generator": "shapes/t2i"}}],
    }
    return {
        **{key: value for key, value in TINY.items() if key != "compute"},
        "recipe": recipe,
        "methods": methods,
        "reference": next(iter(methods)),
        **changes,
    }


def write(folder: Path, content: dict[str, Any] | None = None, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**(content or TINY), **changes}))
    return path
