"""A field that waits in main memory: on the device for its turn, and the same velocities."""

import weakref

import pytest
import torch
from closed_forms import TinyNet

import danceopd as d
from danceopd.fields.adapters import AdapterBackbone, AdapterField
from danceopd.fields.offload import OffloadedField

CPU = torch.device("cpu")
Z, SIGMA = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.5, 0.1])


def places(net):
    return {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}


class Watched(TinyNet):
    """Records, at every call, where its weights are, and keeps a weak hold on one of them there."""

    def __init__(self):
        super().__init__()
        self.seen, self.fails = [], False

    def forward(self, z, sigma, condition=None):
        self.seen.append((places(self), weakref.ref(self.fc_in.weight.untyped_storage())))
        if self.fails:
            raise RuntimeError("inside")
        return super().forward(z, sigma, condition)


def test_weights_are_on_the_device_during_a_velocity_and_not_after():
    net = Watched()
    plain = d.ModelField(net)
    expected, rest = plain.velocity(Z, SIGMA, None), places(net)
    field = OffloadedField(plain, net, CPU)
    net.seen.clear()
    assert torch.equal(field.velocity(Z, SIGMA, None), expected)
    (during, copy), *more = net.seen
    assert not more
    assert during.isdisjoint(rest)
    assert places(net) == rest
    assert copy() is None  # the device's copy is gone
    net.fails = True
    with pytest.raises(RuntimeError, match="inside"):
        field.velocity(Z, SIGMA, None)
    assert places(net) == rest
    assert field.calls_per_velocity == 1


def test_adapters_travel_with_their_backbone():
    net = Watched()
    backbone = AdapterBackbone(net)
    backbone.create("one", rank=2, alpha=2.0, targets=("fc_in",), generator=torch.Generator().manual_seed(0))
    for parameter in backbone.parameters("one"):
        parameter.requires_grad_(False).add_(0.1)
    plain = AdapterField(backbone, net, "one")
    expected, rest = plain.velocity(Z, SIGMA, None), places(net)
    assert torch.equal(OffloadedField(plain, net, CPU).velocity(Z, SIGMA, None), expected)
    assert net.seen[-1][0].isdisjoint(rest)
    assert places(net) == rest


def test_a_module_in_training_is_not_moved_about():
    with pytest.raises(ValueError, match="needs frozen weights on cpu, found trainable on cpu"):
        OffloadedField(d.ModelField(TinyNet()), TinyNet(), CPU)
