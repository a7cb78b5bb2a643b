"""What the throughput benchmark calls the textbook loop does the same update as the method that it is held against."""

import pytest
import throughput
import torch
from closed_forms import GaussianField
from torch import nn

import danceopd as d


class Elementwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, sigma, condition=None):
        return self.a * z + 0.1 * sigma[:, None]


def samples(count, generator):
    return d.Samples(condition=torch.zeros(count, 1), shape=(4,))


@pytest.mark.parametrize("stratified", [False, True])
def test_the_textbook_loop_has_the_gradient_of_the_batched_update_and_makes_every_step(stratified):
    fields = [GaussianField(0.7, 0.5), GaussianField(-0.4, 1.5)]
    gradients, calls = [], []
    for step in (d.DanceOPD.step, throughput.textbook_step):
        routes = [d.Route(f"route {index}", field, samples) for index, field in enumerate(fields)]
        method = d.DanceOPD(routes=routes, grid=d.shifted_grid(steps=8, shift=3.0), stratified=stratified)
        student = Elementwise()
        done = step(
            method, student, batch_size=6, generator=torch.Generator().manual_seed(3), backward=torch.Tensor.backward
        )
        gradients.append(student.a.grad)
        calls.append(done if isinstance(done, d.NetworkCalls) else done.calls)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs() > 1e-3
    assert calls[1] == d.NetworkCalls(rollout=6 * 8, field=6, train=6)
    assert calls[0].rollout < calls[1].rollout


def test_the_benchmark_times_every_mode_in_one_run(capsys):
    throughput.main("Shapes", batch_size=4, micro_batch=2, steps=4, repeats=1)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("Shapes on ")
    assert [line.split()[0] for line in lines] == ["textbook", "fresh", "streaming", "off-policy"]
    assert lines[0].split()[-4] == "8.0"  # four steps, one field, a forward and a backward pass
    assert lines[3].split()[-4] == "4.0"
