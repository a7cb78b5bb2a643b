"""Merging weights and LoRAs."""

import pytest
import torch

from danceopd.baselines.merge import merged_loras, merged_weights
from danceopd.fields.lora import Lora


def lora(rank, seed, alpha=4.0):
    generator = torch.Generator().manual_seed(seed)
    return Lora(
        rank=rank,
        alpha=alpha,
        weights={
            "fc.lora_A.weight": torch.randn(rank, 5, generator=generator),
            "fc.lora_B.weight": torch.randn(3, rank, generator=generator),
        },
    )


def delta(item):
    return item.alpha / item.rank * item.weights["fc.lora_B.weight"] @ item.weights["fc.lora_A.weight"]


def test_merging_loras_averages_the_full_weights():
    one, two = lora(2, 0), lora(4, 1, alpha=8.0)
    merged = merged_loras([(one, 1.0), (two, 2.0), (None, 1.0)])  # the base is a source too
    torch.testing.assert_close(delta(merged), 0.25 * delta(one) + 0.5 * delta(two))
    base = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    full = merged_weights([({"fc": base + delta(one)}, 1.0), ({"fc": base + delta(two)}, 2.0), ({"fc": base}, 1.0)])
    torch.testing.assert_close(full["fc"], base + delta(merged))


def test_merges_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one LoRA"):
        merged_loras([(None, 1.0)])
    with pytest.raises(ValueError, match="positive weights"):
        merged_loras([(lora(2, 0), 0.0)])
    with pytest.raises(ValueError, match="'b' is not in all"):
        merged_weights([({"a": torch.ones(1)}, 1.0), ({"a": torch.ones(1), "b": torch.ones(1)}, 1.0)])
    with pytest.raises(ValueError, match=r"at 'a': shapes \(1,\) and \(2,\)"):
        merged_weights([({"a": torch.ones(1)}, 1.0), ({"a": torch.ones(2)}, 1.0)])
