import torch

from danceopd.training.hardware import resolve_precision


def test_a_stated_precision_is_kept():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"


def test_auto_takes_the_faster_one(monkeypatch):
    """A clock that is told how long a product takes under autocast and without."""
    threads = torch.get_num_threads()
    for slow, expected in ((1.0, "fp32"), (5.0, "bf16")):
        now = [0.0]

        def linear(a, b, now=now, slow=slow):
            assert torch.get_num_threads() == 1  # so that other work beside it hardly counts
            now[0] += 1.0 if torch.is_autocast_enabled("cpu") else slow
            return a

        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        monkeypatch.setattr("time.perf_counter", lambda now=now: now[0])
        torch.set_num_threads(2)
        assert resolve_precision("auto", torch.device("cpu")) == expected
        assert torch.get_num_threads() == 2
        torch.set_num_threads(threads)
        monkeypatch.undo()
