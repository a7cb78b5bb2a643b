"""The library stands without the command line, as the README writes it."""

import copy

import torch
from closed_forms import TinyNet

import danceopd as d


def test_the_readme_example_trains_and_samples():
    MyNet = TinyNet  # forward(z [B, ...], sigma [B], condition) -> eps - x
    my_expert = TinyNet(seed=5)
    drop_text = torch.zeros_like

    def t2i_samples(count, generator):
        return d.Samples(condition=torch.randn(count, 2, generator=generator), shape=(4,))

    edit_samples = t2i_samples
    student = MyNet()
    base = d.ModelField(copy.deepcopy(student))
    edit = d.GuidedField(d.ModelField(my_expert), empty=drop_text, guidance_scale=3.5)
    method = d.DanceOPD(
        routes=[d.Route("t2i", base, t2i_samples), d.Route("edit", edit, edit_samples)],
        grid=d.shifted_grid(steps=16, shift=3.0),
        query=d.BetaQuery(5, 2),
        per="sample",
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(100):
        result = method.step(student, batch_size=64, generator=rng)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss.detach()))
    condition = torch.zeros(4, 2)
    images = d.sample(student, condition, shape=(4, 4), grid=method.grid, generator=rng)
    assert images.shape == (4, 4)
    assert bool(images.isfinite().all())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_every_public_name_exists():
    assert all(hasattr(d, name) for name in d.__all__)
