"""The Shapes world's evaluation: which noise scores what, and whose scores are held against whose."""

import numpy as np
import torch

from danceopd.evaluation import shapes
from danceopd.evaluation.shapes import Scored, evaluate_models, scene_noise, score_model
from danceopd.families.shapes import ShapesFamily
from danceopd.recipe import evaluate_part


def test_every_scene_starts_from_its_own_noise_whatever_the_batch():
    seen = []

    def velocity(z, sigma, condition):
        seen.append(z)
        return z

    part = evaluate_part({"scenes_per_task": 2, "num_inference_steps": 1, "batch_size": 5, "seed": 3})
    score_model(velocity, ShapesFamily(), "t2i", part)
    assert [len(z) for z in seen] == [5, 5, 2]
    assert torch.equal(torch.cat(seen), torch.cat([scene_noise(3, task, 2) for task in range(6)]))


def test_ratios_are_of_the_student_over_others_and_of_all_over_the_base(monkeypatch):
    def constant(value, family, capability, part, **options):
        return Scored(np.full((6, 4), value), None, torch.zeros(6, 3, 32, 32), non_finite=0)

    monkeypatch.setattr(shapes, "score_model", constant)
    report = evaluate_models({"base": 0.5, "expert": 0.4, "student": 0.8}, None, evaluate_part({}))

    def both(value):
        return {kind: {"value": value, "low": value, "high": value} for kind in ("t2i", "edit")}

    assert report["student_over"] == {"base": both(1.6), "expert": both(2.0)}
    assert report["over_base"] == {"expert": both(0.8), "student": both(1.6)}
