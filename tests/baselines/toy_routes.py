"""What the baselines' tests teach on: a grid of four steps and inputs without content."""

import torch

import danceopd as d

GRID = d.shifted_grid(steps=4, shift=2.0)


def inputs(count, generator, size=4):
    return d.Samples(condition=torch.zeros(count, 2), shape=(size,), target=torch.full((count, size), 0.5))


def untargeted(size):
    return lambda count, generator: d.Samples(condition=torch.zeros(count, 2), shape=(size,))
