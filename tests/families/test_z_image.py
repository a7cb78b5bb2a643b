"""Our rollouts of Z-Image and Z-Image Omni against the unmodified pipelines, and what the family refuses."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_pipelines import CHAT_TOKENS, z_image_family

import danceopd as d
from danceopd.distill.solver import integrate
from danceopd.families.z_image import ZImageCondition, captions, padded
from danceopd.fields.field import ModelField
from danceopd.states import concatenate, select, signature
from danceopd.tiny.pipelines import omni_pipeline, z_image_pipeline

PROMPTS = ["a red circle", "a small blue square beside a green star"]
HEIGHT, WIDTH, STEPS = 32, 16, 5
SHAPE = (4, 16, 8)


@pytest.fixture(scope="module")
def plain():
    return z_image_pipeline()


@pytest.fixture(scope="module")
def omni():
    """Its pipeline hands its VAE sources in bfloat16, and so needs one in bfloat16."""
    pipeline = omni_pipeline()
    pipeline.vae.to(torch.bfloat16)
    return pipeline


def pipeline_latents(pipeline, guidance_scale=0.0, prompts=PROMPTS, **options):
    """The pipeline's guidance_scale is alpha - 1; a list of prompts is written over by its call."""
    return pipeline(
        prompt=list(prompts),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=CHAT_TOKENS,
        output_type="latent",
        **options,
    ).images


def starting_noise():
    return torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(3))


def picture(height, width, seed=4):
    """Omni's pipeline takes no side below 64."""
    pixels = torch.randint(0, 2, (height, width, 3), generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(pixels.byte().numpy())


def tensor(image):
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def rollout(family, condition, velocity=None, noise=None):
    noise = starting_noise() if noise is None else noise
    return integrate(velocity or family.model, noise, condition, family.grid(STEPS, shape=SHAPE))


def guided(family, alpha, negative=""):
    return d.GuidedField(
        ModelField(family.model),
        empty=lambda condition: family.empty(condition, negative),
        guidance_scale=alpha,
        combine=family.guide,
    )


@pytest.mark.parametrize("kind", ["plain", "omni"])
def test_the_rollout_is_the_pipelines(kind, request):
    pipeline = request.getfixturevalue(kind)
    family = z_image_family(pipeline)
    found = rollout(family, family.encode(PROMPTS, None))
    torch.testing.assert_close(found, pipeline_latents(pipeline), rtol=0, atol=1e-5)
    other = pipeline_latents(pipeline, prompts=["another", "prompt"])
    assert float((found - other).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "omni"])
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_rollout_is_the_pipelines_under_guidance_of_one_less(kind, negative, request):
    pipeline = request.getfixturevalue(kind)
    family = z_image_family(pipeline)
    found = rollout(family, family.encode(PROMPTS, None), guided(family, 4.0, negative).velocity)
    needed = pipeline_latents(pipeline, guidance_scale=3.0, negative_prompt=[negative] * 2)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)
    assert float((needed - pipeline_latents(pipeline)).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_an_edits_rollout_is_the_pipelines_whatever_the_sources_size(omni, size):
    family, image = z_image_family(omni), picture(*size)
    found = rollout(family, family.encode(PROMPTS, [tensor(image)] * 2))
    needed = pipeline_latents(omni, image=image)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)
    other = pipeline_latents(omni, image=picture(*size, seed=5))
    assert float((needed - other).abs().max()) > 1e-3


def test_edits_of_one_batch_have_each_their_own_source(omni):
    family, images = z_image_family(omni), [picture(64, 96), picture(64, 96, seed=5)]
    found = rollout(family, family.encode(PROMPTS, [tensor(image) for image in images]))
    for index, image in enumerate(images):
        needed = pipeline_latents(omni, image=image)[index]
        torch.testing.assert_close(found[index], needed, rtol=0, atol=1e-5)


def test_an_edit_under_guidance_keeps_its_source_in_the_empty_condition(omni):
    family, image = z_image_family(omni), picture(64, 96)
    condition = family.encode(PROMPTS, [tensor(image)] * 2)
    found = rollout(family, condition, guided(family, 3.5).velocity)
    needed = pipeline_latents(omni, guidance_scale=2.5, image=image)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "omni", "edit"])
def test_each_sample_may_have_its_own_sigma(kind, plain, omni):
    family, sigma = z_image_family(plain if kind == "plain" else omni), torch.tensor([0.9, 0.3])
    sources = [tensor(picture(64, 96)), tensor(picture(64, 96, seed=5))] if kind == "edit" else None
    condition = family.encode(PROMPTS, sources)
    together = family.model(starting_noise(), sigma, condition)
    for index in range(2):
        rows = torch.tensor([index])
        alone = family.model(starting_noise()[rows], sigma[rows], select(condition, rows))
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5)


def test_conditions_share_a_batch_whatever_their_prompts(omni):
    family, sources = z_image_family(omni), [tensor(picture(64, 96))]
    for given in (None, sources):
        short, long = (family.encode([prompt], given) for prompt in PROMPTS)
        assert signature(short) == signature(long) == signature(family.empty(short, "blurry"))
        both = concatenate([short, long])
        together = family.encode(PROMPTS, None if given is None else given * 2)
        assert torch.equal(both.lengths, together.lengths)
        torch.testing.assert_close(both.prompt_embeds, together.prompt_embeds)
    assert signature(family.encode(PROMPTS[:1], None)) != signature(family.encode(PROMPTS[:1], sources))


def test_padding_is_undone():
    parts = [[torch.randn(length, 3) for length in lengths] for lengths in ([2, 5, 1], [2, 4, 1])]
    tokens, lengths = padded(parts, longest=7)
    assert tokens.shape == (2, 10, 3)
    assert lengths.tolist() == [[2, 5, 1], [2, 4, 1]]
    found = captions(ZImageCondition(prompt_embeds=tokens, lengths=lengths), torch.float32)
    for caption, needed in zip(found, parts, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(caption, needed, strict=True))


def test_a_prompt_too_long_is_cut_as_the_pipeline_cuts_it(plain):
    family, prompts = z_image_family(plain), ["a circle " * 20, "a star"]
    needed = pipeline_latents(plain, prompts=prompts)
    torch.testing.assert_close(rollout(family, family.encode(prompts, None)), needed, rtol=0, atol=1e-5)


def test_the_grid_is_the_pipelines_static_or_dynamic(plain):
    family = z_image_family(plain)
    torch.testing.assert_close(family.grid(STEPS).sigmas, d.shifted_grid(steps=STEPS, shift=3.0).sigmas)
    dynamic = z_image_pipeline()
    dynamic.scheduler = type(plain.scheduler).from_config(plain.scheduler.config, use_dynamic_shifting=True)
    family = z_image_family(dynamic)
    needed = pipeline_latents(dynamic)
    torch.testing.assert_close(rollout(family, family.encode(PROMPTS, None)), needed, rtol=0, atol=1e-5)


def test_a_vae_in_bf16_sees_and_draws_what_the_pipelines_does(omni):
    family, image = z_image_family(omni), picture(64, 96)
    found = family.encode(PROMPTS, [tensor(image)] * 2).source
    pixels = omni.image_processor.preprocess(image, height=64, width=96)
    with torch.no_grad():
        ((source,),) = omni.prepare_image_latents([pixels], 1, torch.device("cpu"), torch.float32)
        latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(6))
        plain = latents.bfloat16() / omni.vae.config.scaling_factor + omni.vae.config.shift_factor
        drawn = omni.vae.decode(plain).sample.float().clamp(-1, 1)
    assert found.dtype == torch.float32
    assert all(torch.equal(row, source.squeeze(1)) for row in found)
    assert torch.equal(family.decode(latents), drawn)


def test_what_does_not_fit_is_refused(plain, omni):
    family, editor = z_image_family(plain), z_image_family(omni)
    sources = [torch.zeros(3, 16, 16)]
    assert not family.can_edit
    with pytest.raises(ValueError, match=r"'z_image' with a ZImagePipeline .*cannot edit, found 1 source images.*Omni"):
        family.encode(["make it red"], sources)
    assert editor.can_edit
    with pytest.raises(ValueError, match="found 1 for 2 prompts"):
        editor.encode(PROMPTS, sources)
    with pytest.raises(ValueError, match=r"image 1 has shape \(3, 16, 20\)"):
        editor.encode(PROMPTS, [*sources, torch.zeros(3, 16, 20)])
    edit = editor.encode(["make it red"], sources)
    z, sigma = starting_noise()[:1], torch.tensor([0.5])
    with pytest.raises(ValueError, match="in one part and no source"):
        family.model(z, sigma, edit)
    with pytest.raises(ValueError, match="in three parts, a source and its vision tokens"):
        editor.model(z, sigma, replace(edit, vision=None))
    with pytest.raises(ValueError, match="in three parts, a source and its vision tokens"):
        editor.model(z, sigma, replace(edit, source=None, vision=None))
