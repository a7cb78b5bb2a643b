"""Sources in a folder of their own: the text encoder beside the base, and that no other one is taken."""

import pytest
import torch
from safetensors.torch import save_file

from danceopd.evaluation.shapes import score_model
from danceopd.families.shapes import WEIGHTS, ShapesFamily
from danceopd.fields.weights import WeightsError, file_hash, read_safetensors
from danceopd.recipe import evaluate_part
from danceopd.training.fields import FieldInput
from danceopd.world.text import TextEncoder


@pytest.fixture
def folder(tmp_path):
    """A base and a LoRA beside a text encoder that is not the shipped one, recorded in both."""
    save_file(TextEncoder().state_dict(), tmp_path / "text.safetensors")
    recorded = {"text": file_hash(tmp_path / "text.safetensors")}
    for name in ("base", "edit"):
        tensors, metadata = read_safetensors(WEIGHTS / f"{name}.safetensors")
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata | recorded)
    return tmp_path


def test_the_text_encoder_beside_the_base_is_used(folder):
    family, shipped = ShapesFamily(str(folder / "base.safetensors")), ShapesFamily()
    assert family.files["text encoder"] == folder / "text.safetensors"
    own, usual = (each.encode(["a red circle"], None).prompt_embeds for each in (family, shipped))
    assert not torch.allclose(own, usual)
    assert family.load_lora(folder / "edit.safetensors").rank == shipped.load_lora(WEIGHTS / "edit.safetensors").rank
    (folder / "text.safetensors").unlink()
    alone = folder / "alone.safetensors"
    save_file(read_safetensors(folder / "base.safetensors")[0], alone)
    assert torch.equal(ShapesFamily(str(alone)).encode(["a red circle"], None).prompt_embeds, usual)


def test_sources_of_another_text_encoder_are_refused(folder):
    with pytest.raises(WeightsError, match=r"edit\.safetensors was trained with the text encoder of SHA-256"):
        ShapesFamily().load_lora(folder / "edit.safetensors")
    with pytest.raises(WeightsError, match="text encoder of SHA-256"):
        ShapesFamily().load_model(folder / "base.safetensors")
    save_file(TextEncoder().state_dict(), folder / "text.safetensors")
    with pytest.raises(WeightsError, match="text encoder of SHA-256"):
        ShapesFamily(str(folder / "base.safetensors"))


def test_a_model_is_guided_by_the_empty_prompt_of_the_family_that_it_hears(folder):
    """The second half of a guided call is the empty condition; here the model's own family's, not the student's."""
    student, own = ShapesFamily(), ShapesFamily(str(folder / "base.safetensors"))
    heard = []

    def velocity(z, sigma, condition):
        heard.append(condition)
        return z

    part = evaluate_part({"scenes_per_task": 2, "num_inference_steps": 1, "guidance_scale": 2.0, "batch_size": 12})
    score_model(velocity, student, "t2i", part, encoder=FieldInput(own))
    (condition,) = heard
    empty = own.empty(own.encode(["a red circle"], None))
    assert torch.equal(condition.pooled_embeds[12:], empty.pooled_embeds.expand(12, -1))
    assert not torch.allclose(empty.pooled_embeds, student.empty(student.encode(["a red circle"], None)).pooled_embeds)
