import numpy as np
import pytest
import torch

from danceopd.world import generator
from danceopd.world.generator import _TRAINING, SOURCE_TRAINING, GeneratedExamples, evaluation_set
from danceopd.world.tasks import EDIT_TASKS, T2I_TASKS, draw_edit, draw_text_to_image
from danceopd.world.text import MAX_TOKENS, PHRASE, TextEncoder, UnknownWord, parse, phrase_targets, tokenize


def test_every_sentence_of_the_world_is_in_the_vocabulary():
    rng = np.random.default_rng(0)
    sentences = [draw_text_to_image(rng).prompt for _ in range(2000)] + [
        draw_edit(rng).instruction for _ in range(2000)
    ]
    assert tokenize(sentences).shape == (4000, MAX_TOKENS)


def test_unknown_words_and_long_prompts_are_refused():
    with pytest.raises(UnknownWord, match=r"'circel' \(did you mean 'circle'\?\)"):
        tokenize(["a red circel"])
    with pytest.raises(UnknownWord, match="16 words, at most 15"):
        tokenize([" ".join(["a"] * 16)])


def test_padding_does_not_change_the_encoding():
    encoder = TextEncoder().eval()
    tokens, pooled = encoder(tokenize(["a red circle", "a red circle and a blue square in striped style"]))
    alone = encoder(tokenize(["a red circle"]))
    torch.testing.assert_close(pooled[:1], alone[1])
    assert bool((tokens[0, 4:] == 0).all())


def test_generated_examples_depend_on_seed_and_index_alone():
    a, b = GeneratedExamples("shapes/edit", size=50, seed=1), GeneratedExamples("shapes/edit", size=50, seed=1)
    assert a[7].prompt == b[7].prompt
    assert torch.equal(a[7].target, b[7].target)
    assert [GeneratedExamples("shapes/edit", size=50, seed=2)[i].prompt for i in range(9)] != [
        a[i].prompt for i in range(9)
    ]
    same = GeneratedExamples("shapes/edit", size=50, seed=1).digest()
    assert a.digest() == same
    others = [("shapes/local", 50, 1), ("shapes/edit", 51, 1), ("shapes/edit", 50, 2)]
    assert same not in [GeneratedExamples(name, size=size, seed=seed).digest() for name, size, seed in others]
    assert len(list(a)) == 50
    with pytest.raises(IndexError, match="examples 0 to 49, found 50"):
        a[50]
    with pytest.raises(ValueError, match="unknown generator"):
        GeneratedExamples("shapes/video", size=1, seed=0)


@pytest.mark.parametrize(("name", "edits"), [("shapes/t2i", False), ("shapes/edit", True)])
def test_mismatched_examples_ask_the_same_and_show_something_else_in_a_quarter(name, edits):
    exact, mismatched = (GeneratedExamples(each, size=400, seed=3) for each in (name, f"{name}_mismatched"))
    wrong = 0
    for right, other in zip(exact, mismatched, strict=True):
        assert right.prompt == other.prompt
        assert (right.source is not None) == (other.source is not None) == edits
        assert not edits or torch.equal(right.source, other.source)
        if not torch.equal(right.target, other.target):
            wrong += 1
            assert not edits or torch.equal(other.target, other.source)
    assert 0.18 < wrong / 400 < 0.32  # a quarter within three standard deviations
    assert exact.digest() != mismatched.digest()


def test_evaluation_scenes_are_fresh_and_fixed(monkeypatch):
    drawn = evaluation_set(T2I_TASKS + EDIT_TASKS, per_task=3, seed=0)
    assert [item.task for item in drawn[::3]] == list(T2I_TASKS + EDIT_TASKS)
    assert drawn == evaluation_set(T2I_TASKS + EDIT_TASKS, per_task=3, seed=0)
    assert drawn != evaluation_set(T2I_TASKS + EDIT_TASKS, per_task=3, seed=1)
    assert evaluation_set(["counting"], per_task=5, seed=0)[:3] == drawn[6:9]
    for stream in (_TRAINING, SOURCE_TRAINING):  # what an evaluation would draw from a training stream
        monkeypatch.setattr(generator, "_EVALUATION", stream)
        met = evaluation_set(T2I_TASKS + EDIT_TASKS, per_task=3, seed=0)
        assert sum(a == b for a, b in zip(met, drawn, strict=True)) <= 2


def test_a_sentence_is_parsed_into_what_it_says_of_each_object():
    assert parse("a red circle and a blue square") == {
        2: {"shape": "circle", "order": "first", "role": "drawn", "color": "red"},
        6: {"shape": "square", "order": "second", "role": "drawn", "color": "blue"},
    }
    above = parse("a cross above a triangle on a pink background")
    assert [said["side"] for said in above.values()] == ["above", "below"]
    assert parse("three crosses") == {1: {"shape": "cross", "order": "first", "role": "drawn", "number": "three"}}
    (added,) = parse("add a cyan square at the bottom right").values()
    assert (added["role"], added["row"], added["column"]) == ("added", "bottom", "right")
    (recolored,) = parse("make the red circle purple").values()
    assert (recolored["color"], recolored["new_color"]) == ("red", "purple")
    assert [said["role"] for said in parse("replace the red circle with a blue cross").values()] == [
        "replaced",
        "replacement",
    ]


def test_the_encoder_is_asked_at_the_nouns_only():
    targets = phrase_targets(["a red circle"])[0]
    assert bool((targets[3] >= 0).all())  # <start> a red circle
    assert bool((targets[[0, 1, 2, 4, 15]] == -1).all())
    assert int(targets[3, list(PHRASE).index("color")]) == PHRASE["color"].index("red") + 1
