"""What a model card says of a run's sources, and what it keeps to itself."""

from types import SimpleNamespace

from danceopd.exports import MADE_BY, model_card
from danceopd.recipe import METHODS, parse_recipe
from danceopd.recipe.file import read_yaml
from danceopd.training.checkpoint import TrainingState
from danceopd.training.run_folder import RunFolder

CONTENT = {
    "version": 1,
    "family": "flux",
    "base": "/home/me/models/flux",
    "fields": {
        "edit": {
            "lora": "/home/me/a/style.safetensors",
            "lora_scale": 0.5,
            "checkpoint": "/home/me/w/edit.safetensors",
            "guidance_scale": 2.0,
            "negative_prompt": "/blurry",
            "prompt_prefix": "photo,",
        },
        "hub": {"lora": "org/style", "base": "/home/me/models/other"},
        "twin": {"lora": "/home/you/a/style.safetensors"},
        "named": {"lora": "/home/me/org/style"},
    },
    "routes": [
        {"field": "edit", "data": {"manifest": "/home/me/data/edits.jsonl"}, "resolution": 64},
        {"field": "twin", "name": "second", "data": {"manifest": "/home/me/data/prompts.jsonl"}},
    ],
    "output": "/home/me/run",
}
NAMES = {
    "/home/me/models/flux": "models/flux",
    "model_index.json": "model_index.json",
    "/home/me/w/edit.safetensors": "w/edit.safetensors",
    "/home/me/a/style.safetensors": "a/style.safetensors",
    "/home/you/a/style.safetensors": "a/style.safetensors (2)",
    "org/style": "org/style",
    "org/style: commit": "org/style: commit",
    "/home/me/org/style": "org/style (2)",
    "/home/me/models/other": "models/other",
    "/home/me/models/other: vae/config.json": "models/other: vae/config.json",
    "data of edit": "data of edit",
}
"""What the run's hashes call a source, and what the card does."""


def card_of(content, hashes, folder):
    state = TrainingState(step=3, ema_updates=3, generator="", buckets={}, hashes=hashes, calls={}, seconds=1.0)
    run = SimpleNamespace(recipe=parse_recipe(content, where="test"), family=SimpleNamespace(size=(16, 24)))
    return model_card(RunFolder(folder), run, state, None)


def test_a_card_names_every_source_by_itself_and_no_folder(tmp_path):
    hashes = {source: f"{index:064}" for index, source in enumerate(NAMES)}
    card = card_of(CONTENT, hashes, tmp_path)
    assert card.base == "flux"
    assert card.fields == {
        "edit": "a/style.safetensors over w/edit.safetensors, LoRA scale 0.5, guidance 2, negative prompt '/blurry', "
        "prompt prefix 'photo,'",
        "hub": "org/style over models/other",
        "twin": "a/style.safetensors (2)",
        "named": "org/style (2)",
    }
    assert card.hashes == {NAMES[source]: digest for source, digest in hashes.items()}
    public = parse_recipe(read_yaml(card.recipe), where="the card")
    assert public.fields["edit"].negative_prompt == "/blurry"
    assert (public.base, public.fields["twin"].lora) == ("models/flux", "a/style.safetensors (2)")
    assert not any("/home" in text for text in (card.recipe, *card.fields.values(), *card.hashes))
    assert "64 x 64 (edit), 16 x 24 (second) pixels" in card.limits[0]
    assert len(card.limits) == 1


def test_the_card_of_a_few_step_student_says_in_how_many_steps_it_was_taught_to_sample(tmp_path):
    content = CONTENT | {"rollout": {"num_inference_steps": 4, "substeps": 4}, "evaluate": {"num_inference_steps": 4}}
    card = card_of(content, {}, tmp_path)
    assert card.limits[1:] == ["Taught to sample in 4 steps; other numbers of steps were not taught."]


def test_every_method_has_its_words_on_the_card():
    assert MADE_BY.keys() == METHODS.keys()


def test_a_merge_is_not_said_to_be_trained_or_told_anything(tmp_path):
    content = CONTENT | {
        "method": "weight_merge",
        "train": {"steps": 0},
        "student": {"init": {"twin": 1.0, "named": 1.0}, "init_mode": "merged"},
    }
    card = card_of(content, {}, tmp_path)
    assert (card.title, card.limits) == (
        "A merge of several models",
        ["Nothing was trained: the weights were averaged as they were."],
    )
    assert card.trained == "merged from the weights of its sources, without training"
    assert not card.advice
    taught = card_of(CONTENT, {}, tmp_path)
    assert taught.advice[0].startswith("It has absorbed guidance (edit); ")
    assert taught.advice[1].startswith("Prompts need no trigger words")
