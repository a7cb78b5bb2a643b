"""The memory figures in the docs are those that were counted, and counting again gives the same."""

import json

import memory
import memory_tables
import published_models
import pytest
import torch
from torch import nn


@pytest.fixture
def results():
    return json.loads(memory.RESULTS.read_text())


def test_the_docs_hold_the_recorded_figures(results):
    assert set(results) == {published.name for published in published_models.MODELS}
    for page in memory_tables.PAGES:
        text = (memory.DOCS / page).read_text()
        assert memory_tables.with_tables(page, text, results) == text
        rows = memory_tables.page_rows(results, page)
        assert len(rows) > 2
        assert "\n".join(rows) in text


def test_counting_again_gives_the_recorded_figures(results):
    smallest = next(published for published in published_models.MODELS if published.name == "SD3.5-Medium")
    assert memory.measure(smallest) == results["SD3.5-Medium"]


class Block(nn.Module):
    """Autograd keeps its input, for the gain's gradient, and the square's."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.gain).square()


class Network(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, z, sigma, condition):
        for block in self.blocks:
            z = block(z)
        return z


def test_activations_are_counted_once_each_and_without_weights():
    network = Network(depth=3)
    with memory.FAKES:
        memory.without_data(network)
    found = memory.activation_bytes(network, network, None, 2)
    state = 4 * 2 * torch.Size(published_models.LATENT).numel()
    # The loss keeps one state more. Checkpointed: that one, three blocks' inputs, and the two of one block.
    assert found == {"plain": (2 * 3 + 1) * state, "checkpointed": (1 + 3 + 2) * state}


def test_a_checkpoint_in_main_memory_takes_the_place_of_the_activations():
    found = {"transformer_parameters": 100, "transformer_buffers": 0, "lora_parameters": 0}
    for activations, there in ((50, 200), (500, 500)):
        sums = memory_tables.totals(found, activations)
        assert sums["checkpoint"] - sums["loras"] == 200
        assert sums["checkpoint_on_cpu"] - sums["loras"] == there - activations


def test_a_card_is_filled_to_nine_tenths_at_most():
    full = int(0.9 * 24 * memory_tables.GIB)
    assert memory_tables.smallest_card(full) == "21.6 (24 GB)"
    assert memory_tables.smallest_card(full + 1) == "21.6 (48 GB)"
    assert memory_tables.smallest_card(80 * memory_tables.GIB) == "80.0 (none)"
