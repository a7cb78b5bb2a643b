"""The library stands without the command line, as the README writes it."""

import copy
import re
from pathlib import Path

import torch
from torch import nn

import danceopd as d

README = Path(__file__).parent.parent / "README.md"


class MyNet(nn.Module):
    """One linear map over channels, with sigma and the condition [B, 2] as further inputs."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 6, generator=generator) * 0.3 + shift)

    def forward(self, z, sigma, condition):
        inputs = torch.cat([sigma[:, None], condition], dim=1) @ self.weight[:, 3:].T
        return torch.einsum("oc,bchw->bohw", self.weight[:, :3], z) + inputs[:, :, None, None]


def samples(count, generator):
    return d.Samples(condition=torch.randn(count, 2, generator=generator), shape=(3, 32, 32))


def test_the_readme_example_runs_as_written_and_teaches():
    block = next(
        text for text in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S) if "MyNet" in text
    )
    here = {
        "MyNet": MyNet,
        "my_expert": MyNet(shift=0.05),
        "drop_text": torch.zeros_like,
        "t2i_samples": samples,
        "edit_samples": samples,
        "condition": torch.zeros(4, 2),
    }
    exec(block, here)
    student, method = here["student"], here["method"]
    assert here["images"].shape == (4, 3, 32, 32)
    assert here["images"].isfinite().all()
    fresh = copy.deepcopy(student)
    fresh.load_state_dict(MyNet().state_dict())
    taught, untaught = (
        float(method.step(model, batch_size=64, generator=torch.Generator().manual_seed(1)).loss.detach())
        for model in (student, fresh)
    )
    assert taught < 0.9 * untaught


def test_every_public_name_exists():
    assert all(hasattr(d, name) for name in d.__all__)
