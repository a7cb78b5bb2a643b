import pytest
import torch

from danceopd.distill.selection import choose, inclusion_probabilities


def test_inclusion_probabilities_sum_to_the_count_and_follow_the_mass_where_they_may():
    mass = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).double()
    assert torch.allclose(inclusion_probabilities(mass, 2), 2 * mass)
    capped = inclusion_probabilities(mass, 3)  # 3 x 0.4 > 1: the other 2 in the ratio 1 : 2 : 3, of which 3 is again 1
    assert torch.allclose(capped, torch.tensor([0, 1 / 3, 2 / 3, 1, 1]).double())
    assert torch.equal(inclusion_probabilities(mass, 4), (mass > 0).double())
    with pytest.raises(ValueError, match="5 cannot be chosen among 4"):
        inclusion_probabilities(mass, 5)


@pytest.mark.parametrize("count", [3, 6])
def test_choices_have_exactly_their_marginals_and_their_count(rng, count):
    """In one of the two cases the largest probabilities are cut to 1."""
    mass = torch.tensor([0.0, 1, 1, 2, 2, 3, 3, 4, 9, 9]).double()
    strata, trials = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 5, 5]), 8000
    came = torch.zeros(len(mass)).double()
    for _ in range(trials):
        chosen = choose(mass, strata, count, rng)
        assert len(chosen.unique()) == count
        came[chosen] += 1
    expected = inclusion_probabilities(mass, count)
    error = (expected * (1 - expected) / trials).sqrt()
    assert bool(((came / trials - expected).abs() <= 4.5 * error).all())
    assert bool((expected == 1).any()) == (count == 6)


def test_a_stratum_gets_its_share_and_none_of_its_pairs_is_bound_together(rng):
    mass, strata = torch.ones(12).double(), torch.arange(12) // 4
    pairs = torch.zeros(12, 12)
    for _ in range(2000):
        chosen = choose(mass, strata, 6, rng)
        assert torch.equal(strata[chosen].bincount(), torch.tensor([2, 2, 2]))
        pairs[chosen[:, None], chosen[None]] += 1
    within = pairs[:4, :4][~torch.eye(4, dtype=torch.bool)] / 2000
    assert bool(((within - 1 / 6).abs() < 0.05).all())  # 2 of 4, every pair alike
