from pathlib import Path

import pytest

from danceopd.recipe import load_recipe

TWO_EXPERTS = Path(__file__).parent.parent / "two_experts.yaml"
TINY = [
    "routes.0.weight=1",
    "query.per_rollout=1",
    "train.optimizer=adamw",
    "train.learning_rate=1e-3",
    "train.lr_scheduler=constant",
    "train.steps=6",
    "train.batch_size=4",
    "train.precision=fp32",
    "train.checkpointing_steps=2",
    "train.sample_steps=0",
    "rollout.num_inference_steps=4",
    "evaluate.scenes_per_task=2",
    "evaluate.num_inference_steps=2",
]


@pytest.fixture
def tiny(tmp_path):
    """The tests' recipe of two experts, cut to seconds; more overrides may follow."""

    def load(*overrides: str):
        return load_recipe(TWO_EXPERTS, [*TINY, f"output={tmp_path / 'run'}", *overrides])

    return load
