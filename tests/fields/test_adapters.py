"""One backbone, many adapters: the switching traps."""

import copy

import pytest
import torch
from closed_forms import TinyNet
from torch import nn

import danceopd as d
from danceopd.fields.adapters import AdapterBackbone, AdapterField, AdapterMismatch, AdapterModel
from danceopd.fields.lora import Lora, combined
from danceopd.fields.weights import merge_lora

TARGETS = ("fc_in", "fc_out")


def lora(seed: int, rank: int = 3, alpha: float = 6.0, net: nn.Module | None = None) -> Lora:
    net = net or TinyNet()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in TARGETS:
        layer = net.get_submodule(name)
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.2
    return Lora(rank=rank, alpha=alpha, weights=weights)


@pytest.fixture
def shared(rng):
    model = TinyNet()
    backbone = AdapterBackbone(model)
    backbone.add("one", lora(1))
    backbone.add("two", lora(2))
    backbone.create("student", rank=2, alpha=2.0, targets=TARGETS, generator=rng)
    backbone.activate("student")
    return backbone, model


def call(model):
    z, sigma = torch.randn(5, 4, generator=torch.Generator().manual_seed(9)), torch.full((5,), 0.5)
    return model(z, sigma, None)


def test_an_adapter_field_equals_a_merged_copy_to_rounding(shared):
    backbone, model = shared
    merged = TinyNet()
    merge_lora(merged, lora(2))
    with backbone.use("two"):
        torch.testing.assert_close(call(model), call(merged))


def test_a_merge_in_bfloat16_rounds_once():
    net = TinyNet().bfloat16()
    whole = {name: net.get_submodule(name).weight.float() for name in TARGETS}
    merge_lora(net, lora(1))
    for name, weight in whole.items():
        delta = 2.0 * lora(1).weights[f"{name}.lora_B.weight"] @ lora(1).weights[f"{name}.lora_A.weight"]
        assert torch.equal(net.get_submodule(name).weight, (weight + delta).bfloat16())
        assert not torch.equal(net.get_submodule(name).weight, weight.bfloat16() + delta.bfloat16())


def test_a_lora_on_a_module_leaves_its_namesakes_alone():
    net = nn.ModuleDict({"out": nn.Linear(3, 3), "block": nn.ModuleDict({"out": nn.Linear(3, 3)})})
    weights = {"out.lora_A.weight": torch.ones(2, 3), "out.lora_B.weight": torch.ones(3, 2)}
    backbone = AdapterBackbone(net)
    backbone.add("one", Lora(rank=2, alpha=2.0, weights=weights))
    assert backbone.state("one").keys() == weights.keys()


def test_a_students_target_means_linear_layers_alone():
    net = nn.ModuleDict({"proj": nn.Conv2d(3, 3, 2), "block": nn.ModuleDict({"proj": nn.Linear(3, 3)})})
    backbone = AdapterBackbone(net)
    backbone.create("student", rank=2, alpha=2.0, targets=["proj"], generator=torch.Generator())
    assert backbone.state("student").keys() == {"block.proj.lora_A.weight", "block.proj.lora_B.weight"}


def test_adapters_called_as_modules_are_leave_each_others_weights_alone():
    net = nn.ModuleDict({"attention": nn.ModuleDict({"to_q": nn.Linear(3, 3)}), "out": nn.Linear(3, 3)})
    backbone = AdapterBackbone(net)
    backbone.create("student", rank=2, alpha=2.0, targets=["to_q", "out"], generator=torch.Generator())
    before = backbone.state("student")
    weights = {"out.lora_A.weight": torch.ones(2, 3), "out.lora_B.weight": torch.ones(3, 2)}
    backbone.add("attention", Lora(rank=2, alpha=2.0, weights=weights))
    after = backbone.state("student")
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_no_adapter_is_the_base_bit_for_bit(shared):
    backbone, model = shared
    with backbone.use():
        assert torch.equal(call(model), call(TinyNet()))


def test_a_new_student_starts_as_the_base(shared):
    _, model = shared
    assert torch.equal(call(model), call(TinyNet()))


def test_only_the_student_is_trainable_whatever_was_called(shared):
    backbone, model = shared
    for name in ("one", "two", "student"):
        AdapterField(backbone, model, name).velocity(torch.zeros(2, 4), torch.ones(2), None)
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trainable == {key for key, _ in backbone.named_parameters("student")}


def test_teachers_called_between_forward_and_backward_leave_the_students_gradient_alone(shared):
    backbone, model = shared
    teacher = AdapterField(backbone, model, "one")
    with torch.no_grad():
        for parameter in backbone.parameters("student"):
            parameter.add_(0.1)

    def gradients(interrupt):
        loss = call(model).square().mean()
        if interrupt:
            teacher.velocity(torch.zeros(2, 4), torch.ones(2), None)
        return torch.autograd.grad(loss, backbone.parameters("student"))

    for clean, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert float(clean.abs().sum()) > 0
        assert torch.equal(clean, interrupted)


def test_the_active_adapter_is_restored_after_an_error(shared):
    backbone, model = shared
    before = call(model)
    with pytest.raises(RuntimeError, match="inside"), backbone.use("one"):
        raise RuntimeError("inside")
    assert torch.equal(call(model), before)
    with pytest.raises(KeyError, match="no adapter 'three'"), backbone.use("three"):
        pass


def test_several_adapters_at_once_add_up_and_combine_into_one(shared):
    backbone, model = shared
    merged = TinyNet()
    merge_lora(merged, lora(1))
    merge_lora(merged, lora(2))
    with backbone.use("one", "two"):
        torch.testing.assert_close(call(model), call(merged))
    single = TinyNet()
    merge_lora(single, combined([(lora(1), 1.0), (lora(2, rank=3), 1.0)]))
    torch.testing.assert_close(call(single), call(merged))


def test_folded_calls_equal_peft_calls_in_values_and_gradients(shared):
    backbone, model = shared
    with torch.no_grad():
        for parameter in backbone.parameters("student"):
            parameter.add_(0.1)
    z, sigma = torch.randn(5, 4), torch.rand(5)
    results = []
    for fold in (False, True):
        backbone.fold = fold
        out = AdapterModel(backbone, model, "one", "student")(z, sigma, None)
        results.append((out.detach(), torch.autograd.grad(out.square().mean(), backbone.parameters("student"))))
    torch.testing.assert_close(results[0], results[1])
    assert all(float(gradient.abs().sum()) > 0 for gradient in results[1][1])


def test_folded_weights_follow_every_change_and_one_copy_is_kept(shared):
    backbone, model = shared
    z, sigma = torch.randn(5, 4), torch.rand(5)

    def both(*names):
        results = []
        for fold in (False, True):
            backbone.fold = fold
            with torch.no_grad():
                results.append(AdapterModel(backbone, model, *names)(z, sigma, None))
        torch.testing.assert_close(*results)
        return results[1]

    first = both("one", "student")
    assert torch.equal(both("one", "student"), first)
    with torch.no_grad():
        for parameter in backbone.parameters("student"):
            parameter.add_(0.2)
    assert not torch.equal(both("one", "student"), first)  # in place
    added = both("one", "student")
    optimizer = torch.optim.AdamW(backbone.parameters("student"), lr=0.1)
    for parameter in backbone.parameters("student"):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(both("one", "student"), added)
    changed = both("one", "student")
    for parameter in backbone.parameters("student"):
        parameter.data = torch.zeros_like(parameter)
    assert not torch.equal(both("one", "student"), changed)
    both("two")
    kept = sum(weight.numel() for weight in backbone._kept[1])
    assert kept == sum(layer.get_base_layer().weight.numel() for layer in backbone._layers)
    assert all(isinstance(layer.get_base_layer().weight, torch.nn.Parameter) for layer in backbone._layers)
    AdapterModel(backbone, model, "student")(z, sigma, None)
    assert backbone._kept is None  # the training pass forms its own


@pytest.mark.parametrize("fold", [False, True])
def test_student_on_the_shared_backbone_has_zero_loss_against_itself(shared, rng, fold):
    backbone, model = shared
    backbone.fold = fold
    with torch.no_grad():
        for parameter in backbone.parameters("student"):
            parameter.add_(0.05)
    for precision in (torch.float32, torch.bfloat16):
        field = AdapterField(backbone, model, "student")
        method = d.DanceOPD(
            routes=[d.Route("same", field, lambda n, g: d.Samples(condition=None, shape=(4,)))],
            grid=d.shifted_grid(steps=4),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            result = method.step(AdapterModel(backbone, model, "student"), batch_size=8, generator=rng)
        assert float(result.loss.detach()) == 0.0


class Behind(nn.Module):
    """A network of any dtype behind the canonical call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, sigma, condition):
        return self.network(z.to(self.network.fc_in.weight.dtype), sigma, condition).to(z.dtype)


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_a_student_that_starts_as_its_teacher_equals_it_in_every_precision(rng, frozen, autocast, fold):
    model = Behind(TinyNet().to(frozen))
    backbone = AdapterBackbone(model.network, fold=fold)
    backbone.add("teacher", lora(1))
    backbone.create("student", rank=3, alpha=6.0, targets=TARGETS, generator=rng, start=lora(1))
    adapters = {parameter.dtype for name in backbone.names for parameter in backbone.parameters(name)}
    assert adapters == {torch.float32}
    assert {layer.get_base_layer().weight.dtype for layer in backbone._layers} == {frozen}
    route = d.Route(
        "same",
        AdapterField(backbone, model, "teacher"),
        lambda n, g: d.Samples(condition=torch.randn(n, 2, generator=g), shape=(4,)),
    )
    student = AdapterModel(backbone, model, "student")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = d.DanceOPD(routes=[route], grid=d.shifted_grid(steps=4)).step(student, batch_size=8, generator=rng)
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    bare = AdapterField(backbone, model).velocity(torch.ones(2, 4), torch.ones(2), None)
    taught = route.field.velocity(torch.ones(2, 4), torch.ones(2), None)
    assert float((taught - bare).abs().max()) > 0.1
    optimizer = torch.optim.AdamW(backbone.parameters("student"))
    optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


def test_a_student_may_start_from_a_source_with_another_alpha(rng):
    model = TinyNet()
    backbone = AdapterBackbone(model)
    backbone.create("student", rank=3, alpha=3.0, targets=TARGETS, generator=rng, start=lora(1, alpha=6.0))
    backbone.activate("student")
    merged = TinyNet()
    merge_lora(merged, lora(1, alpha=6.0))
    torch.testing.assert_close(call(model), call(merged))


def test_a_student_of_higher_rank_starts_as_its_source_and_can_train_all_of_it(rng):
    model = TinyNet()
    backbone = AdapterBackbone(model)
    backbone.create("student", rank=5, alpha=10.0, targets=TARGETS, generator=rng, start=lora(1, alpha=6.0))
    backbone.activate("student")
    merged = TinyNet()
    merge_lora(merged, lora(1, alpha=6.0))
    torch.testing.assert_close(call(model), call(merged))
    call(model).square().sum().backward()
    added = [p.grad[:, 3:] for name, p in backbone.named_parameters("student") if "lora_B" in name]
    assert all(bool((gradient != 0).all(0).any()) for gradient in added)
    with pytest.raises(AdapterMismatch, match="LoRA of rank 3 with rank 2: use at least rank 3"):
        AdapterBackbone(TinyNet()).create("student", rank=2, alpha=2.0, targets=TARGETS, generator=rng, start=lora(1))


@pytest.mark.parametrize(
    ("student", "source", "message"),
    [
        (["fc_in"], TARGETS, "the student's alone are none, the LoRA's alone 1, first 'fc_out'; give student.lora"),
        (TARGETS, ["fc_out"], "the student's alone are 1, first 'fc_in', the LoRA's alone none; give student.lora"),
    ],
)
def test_a_student_may_not_start_from_a_source_on_other_modules(rng, student, source, message):
    weights = {key: weight for key, weight in lora(1).weights.items() if key.startswith(tuple(source))}
    start = Lora(rank=3, alpha=6.0, weights=weights)
    with pytest.raises(AdapterMismatch, match=message):
        AdapterBackbone(TinyNet()).create("student", rank=3, alpha=6.0, targets=student, generator=rng, start=start)


def test_loras_that_do_not_fit_are_refused_by_name(shared):
    backbone, _ = shared
    foreign = Lora(
        rank=1, alpha=1, weights={"attn.lora_A.weight": torch.zeros(1, 4), "attn.lora_B.weight": torch.zeros(4, 1)}
    )
    with pytest.raises(AdapterMismatch, match=r"lacks, first 'attn'"):
        backbone.add("foreign", foreign)
    wrong = lora(1)
    wrong.weights["fc_in.lora_A.weight"] = torch.zeros(3, 99)
    with pytest.raises(AdapterMismatch, match=r"fc_in.*found shapes \(\(3, 99\)"):
        backbone.add("wrong", wrong)
    assert backbone.names == ["one", "two", "student"]


def test_storage_is_the_backbone_and_the_adapters_and_nothing_more(shared):
    backbone, model = shared
    held = sum(parameter.numel() for parameter in model.parameters())
    alone = sum(parameter.numel() for parameter in TinyNet().parameters())
    adapters = sum(p.numel() for name in backbone.names for p in backbone.parameters(name))
    assert held == alone + adapters
    assert copy.copy(backbone.names) == ["one", "two", "student"]
