import torch

from danceopd.training.hardware import resolve_precision


def test_a_stated_precision_is_kept_and_auto_becomes_one_of_the_two():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
