"""Our rollout of SD3 against the unmodified pipeline, and what the family refuses."""

import pytest
import torch
from tiny_pipelines import TOKENS, sd3_family

import danceopd as d
from danceopd.distill.solver import integrate
from danceopd.fields.field import ModelField
from danceopd.tiny.pipelines import sd3_pipeline

PROMPTS = ["a red circle", "a small blue square beside a green star"]
HEIGHT, WIDTH, STEPS = 32, 16, 5


@pytest.fixture(scope="module")
def pipeline():
    return sd3_pipeline()


def pipeline_latents(pipeline, guidance_scale, **options):
    return pipeline(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=TOKENS,
        output_type="latent",
        **options,
    ).images


def starting_noise(family):
    shape = family.loaded.latent_shape(HEIGHT, WIDTH)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(3))


def test_the_rollout_is_the_pipelines_without_guidance(pipeline):
    family = sd3_family(pipeline)
    found = integrate(family.model, starting_noise(family), family.encode(PROMPTS, None), family.grid(STEPS))
    needed = pipeline_latents(pipeline, 1.0)
    assert needed.shape[-2:] == (16, 8)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_rollout_is_the_pipelines_under_guidance(pipeline, negative):
    family = sd3_family(pipeline)
    field = d.GuidedField(
        ModelField(family.model),
        empty=lambda condition: family.empty(condition, negative),
        guidance_scale=4.5,
        combine=family.guide,
    )
    found = integrate(field.velocity, starting_noise(family), family.encode(PROMPTS, None), family.grid(STEPS))
    needed = pipeline_latents(pipeline, 4.5, negative_prompt=[negative] * 2)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)
    assert float((needed - pipeline_latents(pipeline, 1.0)).abs().max()) > 1e-3


def test_each_sample_may_have_its_own_sigma(pipeline):
    family = sd3_family(pipeline)
    z, condition, sigma = starting_noise(family), family.encode(PROMPTS, None), torch.tensor([0.9, 0.3])
    together = family.model(z, sigma, condition)
    for index in range(2):
        rows = torch.tensor([index])
        alone = family.model(z[rows], sigma[rows], d.states.select(condition, rows))
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5)


def test_the_grid_is_shifted_twice_at_its_end_as_the_scheduler_does_it(pipeline):
    tail = sd3_family(pipeline).grid(28).sigmas[-3:]
    torch.testing.assert_close(tail, torch.tensor([0.1109, 0.0089, 0.0]), rtol=0, atol=1e-4)


def test_another_shift_is_another_pipelines_grid(pipeline):
    family, other = sd3_family(pipeline), sd3_pipeline(shift=1.5)
    other.scheduler.set_timesteps(STEPS)
    assert torch.equal(family.grid(STEPS, shift=1.5).sigmas, other.scheduler.sigmas)
    assert torch.equal(family.grid(STEPS).sigmas, family.grid(STEPS, shift=3.0).sigmas)
    with pytest.raises(ValueError, match="shift > 0, found steps 5 and shift 0"):
        family.grid(STEPS, shift=0)


def test_a_shift_that_depends_on_the_size_follows_the_latents():
    pipeline = sd3_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=True)
    family = sd3_family(pipeline)
    grid = family.grid(STEPS, shape=family.loaded.latent_shape(HEIGHT, WIDTH))
    found = integrate(family.model, starting_noise(family), family.encode(PROMPTS, None), grid)
    torch.testing.assert_close(found, pipeline_latents(pipeline, 1.0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"pass shape=\(C, H, W\)"):
        family.grid(STEPS)


def test_making_a_grid_leaves_the_pipelines_scheduler_alone(pipeline):
    family = sd3_family(pipeline)
    before = pipeline.scheduler.sigmas.clone()
    family.grid(17)
    assert torch.equal(pipeline.scheduler.sigmas, before)


def test_an_edit_is_refused_by_name(pipeline):
    family = sd3_family(pipeline)
    assert not family.can_edit
    with pytest.raises(ValueError, match=r"'sd3' .*cannot edit, found 1 source images"):
        family.encode(["make it red"], [torch.zeros(3, 32, 32)])
    with pytest.raises(ValueError, match="cannot edit"):
        family.samples([d.data.examples.Example(prompt="make it red", source=torch.zeros(3, 32, 32))])
