from pathlib import Path

import torch
from gradient_variance import by_step, second_moment

import danceopd
from danceopd.recipe import load_recipe
from danceopd.training.assemble import assemble

QUICKSTART = Path(danceopd.__file__).parent / "quickstart.yaml"


def test_the_second_moment_of_a_weighed_gradient_is_that_of_draws():
    """Against a million draws of step j with probability q_j, each gradient weighed by b_j / q_j."""
    generator = torch.Generator().manual_seed(0)
    band, asked, norms = (torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(3))
    band, asked = band / band.sum(), asked / asked.sum()
    drawn = torch.multinomial(asked, 1_000_000, replacement=True, generator=generator)
    weighed = (band[drawn] / asked[drawn]).square() * norms[drawn]
    assert abs(second_moment(band, 3 * asked, norms) - weighed.mean()) < 4 * weighed.std() / 1000
    least = second_moment(band, band * norms.sqrt(), norms)
    torch.testing.assert_close(torch.tensor(least).double(), (band * norms.sqrt()).sum().square())
    assert least < second_moment(band, asked, norms)


def test_a_student_that_is_its_field_has_no_gradient_there():
    """The quickstart's starts from the edit source."""
    assembly = assemble(load_recipe(QUICKSTART, ["train.precision=fp32"]), device=torch.device("cpu"))
    (t2i, edit) = (by_step(assembly, index, 2) for index in range(2))
    assert all(float(part.abs().max()) == 0.0 for part in edit)
    assert all(part.shape == (16,) and float(part.min()) > 0.0 for part in t2i)
