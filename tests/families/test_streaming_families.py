"""Streaming rollouts on every family over diffusers: guided fields, two sizes, accumulation, checkpointed gradients."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import CASES

from danceopd.recipe import load_recipe
from danceopd.runs import train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import checkpoints
from recipes import FAMILY, write_recipe

SETTINGS = [
    "rollout={num_inference_steps: 4, mode: streaming, pool: 8, staleness_steps: 2}",
    "routing.stratified=true",
    "routes.0.prompt_dropout=0.5",
    "routes.1.resolution=[24, 16]",
    "train.steps=6",
    "train.learning_rate=1e-2",
    "train.sample_steps=0",
    "train.gradient_accumulation_steps=2",
    "train.gradient_checkpointing=true",
]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_streaming_run_goes_on_exactly_and_costs_what_was_predicted(case, precision, tmp_path):
    path = write_recipe(CASES[case], FAMILY.get(case, case), tmp_path)
    settings = [*SETTINGS, f"train.precision={precision}"]
    whole = train(load_recipe(path, [*settings, f"output={tmp_path / 'whole'}"]))
    cut = [*settings, f"output={tmp_path / 'cut'}"]
    train(load_recipe(path, [*cut, "train.steps=3"]))
    resumed = train(load_recipe(path, cut), resume=True)
    one, two = (checkpoints(folder.checkpoints)[-1] for folder in (whole, resumed))
    for name in ("student", "ema", "optimizer", "method"):
        tensors, others = (load_file(place / f"{name}.safetensors") for place in (one, two))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name
    method = load_file(one / "method.safetensors")
    groups = {name.partition(".")[0] for name in method if name.endswith(".z")}
    assert len(groups) == 2  # the two routes' sizes (and their sources) never share a pass
    last = whole.metrics()[-1]
    assert last["pool/staleness"] > 0.0
    assert last["calls/train"] == 6 * 4
    expected = assemble(load_recipe(path, settings), device=torch.device("cpu")).method.expected_calls()
    assert last["calls/rollout"] == pytest.approx(expected.once + 6 * 4 * expected.rollout, rel=0.2)
