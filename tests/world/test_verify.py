"""Verifiers against the truth: clean, degraded, and one attribute wrong."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from danceopd.world.render import render
from danceopd.world.scene import BACKGROUNDS, COLORS, SHAPES, STYLES, Scene, SceneObject, random_object
from danceopd.world.tasks import EDIT_TASKS, T2I_TASKS, draw_edit, draw_text_to_image
from danceopd.world.verify import meets, read_image, realism_reward, score_edit, score_text_to_image


def random_scene(rng):
    cells = np.sort(rng.choice(4, size=rng.integers(1, 5), replace=False))
    objects = tuple(random_object(rng, cell) for cell in cells)
    return Scene(objects, rng.choice(list(BACKGROUNDS)), rng.choice(STYLES))


def degrade(image, rng):
    """Slight blur (sigma 0.5), noise (0.06 of the range -1..1) and a shift by up to one pixel each way."""
    image = gaussian_filter(image, (0, 0.5, 0.5)) + rng.normal(0, 0.06, image.shape)
    dx, dy = rng.integers(-1, 2, size=2)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return padded[:, 1 + dy : 33 + dy, 1 + dx : 33 + dx].astype(np.float32)


def test_clean_renders_are_read_exactly():
    rng = np.random.default_rng(0)
    right = [read_image(render(scene)).matches(scene) for scene in (random_scene(rng) for _ in range(2000))]
    assert np.mean(right) >= 0.995


def test_degraded_renders_are_read():
    rng = np.random.default_rng(1)
    right = [
        read_image(degrade(render(scene), rng)).matches(scene) for scene in (random_scene(rng) for _ in range(1000))
    ]
    assert np.mean(right) >= 0.98


def test_every_class_is_read_under_every_other():
    for shape in SHAPES:
        for color in COLORS:
            for style in STYLES:
                for background in BACKGROUNDS:
                    scene = Scene((SceneObject(2, shape, color, 1, -1),), background, style)
                    assert read_image(render(scene)).matches(scene), scene


def other(rng, options, current):
    return rng.choice([option for option in options if option != current])


def wrong_in(attribute, scene, rng):
    """The scene with one attribute changed."""
    item = scene.objects[rng.integers(len(scene.objects))]
    if attribute == "color":
        return scene.with_object(replace(item, color=other(rng, list(COLORS), item.color)))
    if attribute == "shape":
        return scene.with_object(replace(item, shape=other(rng, SHAPES, item.shape)))
    if attribute == "count":
        free = scene.free_cells()
        return scene.with_object(random_object(rng, free[0])) if free else scene.without_cell(item.cell)
    if attribute == "place":
        free = scene.free_cells()
        if not free:
            return None
        return scene.without_cell(item.cell).with_object(replace(item, cell=int(rng.choice(free))))
    if attribute == "background":
        return replace(scene, background=other(rng, list(BACKGROUNDS), scene.background))
    return replace(scene, style=other(rng, STYLES, scene.style))


@pytest.mark.parametrize("attribute", ["color", "shape", "count", "place", "background", "style"])
@pytest.mark.parametrize("damaged", [False, True])
def test_one_wrong_attribute_is_not_accepted(attribute, damaged):
    rng = np.random.default_rng(2)
    accepted = []
    while len(accepted) < 400:
        scene = random_scene(rng)
        changed = wrong_in(attribute, scene, rng)
        if changed is not None:
            image = render(changed)
            accepted.append(read_image(degrade(image, rng) if damaged else image).matches(scene))
    assert np.mean(accepted) <= 0.005


@pytest.mark.parametrize("task", T2I_TASKS)
def test_text_to_image_scores_the_truth_and_refuses_a_picture_of_another_prompt(task):
    rng = np.random.default_rng(3)
    examples = [draw_text_to_image(rng, task) for _ in range(150)]
    assert np.mean([score_text_to_image(render(example.scene), example) for example in examples]) == 1.0
    empty = Scene((), "white", "flat")
    assert not any(score_text_to_image(render(empty), example) for example in examples)
    pairs = [(example, other) for example, other in pairwise(examples) if example.prompt != other.prompt]
    assert np.mean([score_text_to_image(render(other.scene), example) for example, other in pairs]) < 0.1


def test_what_each_task_requires_is_enforced():
    rng = np.random.default_rng(4)
    for _ in range(100):
        example = draw_text_to_image(rng, "counting")
        fewer = example.scene.without_cell(example.scene.objects[0].cell)
        assert score_text_to_image(render(fewer), example) == 0
        example = draw_text_to_image(rng, "color_attr")
        first, second = example.scene.objects
        swapped = Scene(
            (replace(first, color=second.color), replace(second, color=first.color)),
            example.scene.background,
            example.scene.style,
        )
        assert score_text_to_image(render(swapped), example) == 0
        example = draw_text_to_image(rng, "position")
        first, second = example.scene.objects
        turned = Scene(
            (replace(second, cell=first.cell), replace(first, cell=second.cell)),
            example.scene.background,
            example.scene.style,
        )
        assert score_text_to_image(render(turned), example) == 0


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_edit_scores_target_one_source_zero_and_vandalism_in_between(task):
    rng = np.random.default_rng(5)
    for _ in range(100):
        edit = draw_edit(rng, task)
        assert score_edit(render(edit.target), edit).overall == 1.0
        unchanged = score_edit(render(edit.source), edit)
        assert (unchanged.followed, unchanged.overall) == (0.0, 0.0)
        cell = next(cell for cell in range(4) if cell != edit.cell)
        before = next((item for item in edit.target.objects if item.cell == cell), None)
        color = next(color for color in COLORS if before is None or color != before.color)
        vandalised = edit.target.with_object(SceneObject(cell, "circle", color))
        score = score_edit(render(vandalised), edit)
        assert score.followed == 1.0
        assert 0 < score.preserved < 1


def test_realism_reward_measures_shading():
    rng = np.random.default_rng(6)
    rewards = {style: [] for style in STYLES}
    for _ in range(300):
        scene = random_scene(rng)
        rewards[scene.style].append(realism_reward(render(scene)))
    assert np.mean(rewards["shaded"]) > 0.95
    assert max(np.mean(rewards[style]) for style in ("flat", "outline", "striped")) < 0.1
    assert realism_reward(render(Scene(()))) == 0.0


def test_half_a_shading_scores_half():
    scene = Scene((SceneObject(0, "square", "red"),), "white", "flat")
    blend = (render(scene) + render(replace(scene, style="shaded"))) / 2
    assert 0.35 < realism_reward(blend) < 0.65


def test_unreadable_things_are_seen_as_something_unknown():
    image = render(Scene(()))
    image[:, 3:13, 3:13] = np.random.default_rng(0).uniform(-1, 1, (3, 10, 10))
    seen = read_image(image)
    assert len(seen.objects) == 1
    assert seen.objects[0].shape is None


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), found \(3, 16, 16\)"):
        read_image(np.zeros((3, 16, 16), np.float32))
    with pytest.raises(ValueError, match="non-finite"):
        read_image(np.full((3, 32, 32), np.nan, np.float32))


def test_requirements_hold_for_the_scene_that_was_drawn():
    rng = np.random.default_rng(7)
    assert all(meets(read_image(render(e.scene)), e.requirement) for e in (draw_text_to_image(rng) for _ in range(300)))
