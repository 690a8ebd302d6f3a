"""Whole models through slots of a device that copies as late as it may: same bits, closed means restored, refusals."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_device import POISON, LazyDevice
from laws import opened, streamed_plan
from torch import nn

import lading
import models
from zoo import EVERY, QUIET, named_tensors, tensors

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::lading.PlanWarning"),
]
NETS = [
    each
    for each in vars(models).values()
    if isinstance(each, type) and issubclass(each, nn.Module) and each not in (nn.Module, models.Symmetric)
]


def outputs_of(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor.clone() for _, tensor in tensors(model(**inputs))]


@pytest.mark.parametrize("homes", [("cpu",), ("disk",), ("cpu", "disk")], ids=str)
@pytest.mark.parametrize("architecture", EVERY)
def test_an_architecture_gives_the_same_bits_through_slots(architecture, homes):
    model, inputs = architecture.build().eval(), architecture.inputs()
    expected = outputs_of(model, inputs)
    plan = streamed_plan(model, 0.3, homes)
    device = LazyDevice(can_pin=homes != ("disk",))
    with opened(model, plan, device) as residency:
        for _ in range(3):
            found = outputs_of(model, inputs)
            assert len(found) == len(expected)
            assert all(torch.equal(one, other) or one.isnan().any() for one, other in zip(found, expected, strict=True))
        streamed = [each for each in plan.placements if each.is_streamed and not each.is_lookup]
        assert (residency.stats().fetches > 0) == bool(streamed)
    assert not device.pinned


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_an_unusual_module_gives_the_same_bits_and_is_as_before_after_close(net):
    model = models.build(net)
    before = {name: (id(each), each.clone()) for name, each in named_tensors(model).items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    x = models.example_input()
    with torch.no_grad():
        expected = model(x)
        with opened(model, streamed_plan(model, 0.2), LazyDevice()):
            for _ in range(2):
                assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    for name, tensor in named_tensors(model).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1]), name
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._state_dict_hooks for module in model.modules())


class Chain(nn.Sequential):
    def __init__(self, num_layers: int = 6, width: int = 16) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(num_layers)))


def chain_and_plan(num_copies: int = 2) -> tuple[Chain, lading.Plan, torch.Tensor]:
    torch.manual_seed(1)
    chain = Chain()
    layer = 16 * 16 * 4 + 16 * 4
    plan = lading.plan(chain, {0: (1 + num_copies) * layer, "cpu": 10**6})
    return chain, plan, torch.randn(2, 16)


def test_weights_are_at_home_between_forwards_and_in_slots_inside_them():
    chain, plan, x = chain_and_plan()
    device = LazyDevice()
    seen = []
    with torch.no_grad(), opened(chain, plan, device):
        spans = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in device.allocated]

        def is_in_slot(weight: torch.Tensor) -> bool:
            return any(begin <= weight.data_ptr() < end for begin, end in spans)

        handles = [layer.register_forward_pre_hook(lambda m, _: seen.append(is_in_slot(m.weight))) for layer in chain]
        chain(x)
        assert seen.count(True) == sum(each.is_streamed for each in plan.placements) > 0
        assert not any(is_in_slot(weight) for weight in chain.parameters())
        assert not any(weight.is_meta for weight in chain.parameters())
        for handle in handles:
            handle.remove()


def test_an_edit_at_home_between_forwards_is_seen_by_the_next_one():
    chain, plan, x = chain_and_plan()
    with torch.no_grad(), opened(chain, plan, LazyDevice()):
        chain(x)
        for layer in chain:
            layer.weight.data.mul_(2)  # leaves no trace in _version
        edited = Chain()
        edited.load_state_dict(chain.state_dict())
        assert torch.equal(chain(x), edited(x))
    with torch.no_grad():
        assert torch.equal(chain(x), edited(x)), "edits survive close"


def test_an_edit_inside_a_forward_persists():
    chain, plan, x = chain_and_plan()
    expected = {name: weight + 1 if name.endswith("weight") else weight for name, weight in chain.state_dict().items()}
    with torch.no_grad(), opened(chain, plan, LazyDevice()):
        handles = [layer.register_forward_hook(lambda m, *_: setattr(m, "weight", m.weight.add_(1))) for layer in chain]
        chain(x)
        for handle in handles:
            handle.remove()
        assert all(torch.equal(chain.state_dict()[name], each) for name, each in expected.items())
    assert all(torch.equal(chain.state_dict()[name], each) for name, each in expected.items())


def test_a_state_dict_taken_inside_a_forward_holds_homes():
    chain, plan, x = chain_and_plan()
    expected = {name: weight.clone() for name, weight in chain.state_dict().items()}
    device = LazyDevice()
    taken = []
    with torch.no_grad(), opened(chain, plan, device):
        spans = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in device.allocated]
        handles = [layer.register_forward_pre_hook(lambda *_: taken.append(chain.state_dict())) for layer in chain]
        chain(x)
        for handle in handles:
            handle.remove()
        for state in taken:
            for name, weight in state.items():
                assert torch.equal(weight, expected[name])
                assert not any(begin <= weight.data_ptr() < end for begin, end in spans)
    assert len(taken) == len(chain)


def test_an_output_that_is_a_view_of_its_blocks_weight_outlives_the_slot():
    class Shows(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.full((4, 8), value))

        def forward(self) -> dict[str, torch.Tensor]:
            return {"rows": self.rows.expand(2, -1, -1), "first": self.rows[0]}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Shows(1.0), Shows(2.0), Shows(3.0)])

        def forward(self) -> list[dict[str, torch.Tensor]]:
            return [part() for part in self.parts]

    net = Net()
    with torch.no_grad(), opened(net, lading.plan(net, {0: 2 * 128, "cpu": 10**6}), LazyDevice()):
        outputs = net()
    for number, output in enumerate(outputs):
        assert all((tensor == number + 1).all() for tensor in output.values())


def test_recording_gradients_through_a_slot_is_refused_and_the_next_forward_is_right():
    chain, plan, x = chain_and_plan()
    with torch.no_grad():
        expected = chain(x)
    with opened(chain, plan, LazyDevice()):
        with pytest.raises(lading.ResidencyError, match=r"gradients recorded.*torch\.no_grad"):
            chain(x)
        with torch.no_grad():
            assert torch.equal(chain(x), expected)
        for weight in chain.parameters():
            weight.requires_grad_(requires_grad=False)
        assert torch.equal(chain(x), expected)
        with pytest.raises(lading.ResidencyError, match="gradients recorded"):
            chain(x.clone().requires_grad_())


@pytest.mark.parametrize("num_copies", [1, 2])
def test_many_threads_call_one_model(num_copies, monkeypatch):
    chain, plan, _ = chain_and_plan(num_copies)
    inputs = [torch.randn(2, 16) for _ in range(8)]
    with torch.no_grad():
        expected = [chain(x) for x in inputs]
    wrong: list[object] = []
    barrier = threading.Barrier(len(inputs))

    def call(number: int) -> None:
        barrier.wait()
        try:
            with torch.no_grad():
                wrong.extend(number for _ in range(30) if not torch.equal(chain(inputs[number]), expected[number]))
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with opened(chain, plan, LazyDevice()):
            threads = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_refused_pinning_stages_and_gives_the_same_bits():
    chain, plan, x = chain_and_plan()
    with torch.no_grad():
        expected = chain(x)
        device = LazyDevice(can_pin=False)
        with opened(chain, plan, device):
            assert torch.equal(chain(x), expected)
        assert device.num_bytes > 0


def test_no_room_on_the_device_leaves_the_model_as_it_was():
    chain, plan, x = chain_and_plan()
    addresses = [weight.data_ptr() for weight in chain.parameters()]

    class Full(LazyDevice):
        def allocate(self, num_bytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(lading.ResidencyError, match=r"memory of cpu: found no room for .* plan with less max_memory"):
        opened(chain, plan, Full())
    assert not any(module._forward_pre_hooks for module in chain.modules())
    assert len([weight.data_ptr() for weight in chain.parameters()]) == len(addresses)
    with torch.no_grad():
        assert chain(x).isfinite().all()


def test_weights_with_state_of_their_own_are_refused_by_name():
    class Scaled(nn.Parameter):
        pass

    chain, plan, _ = chain_and_plan()
    for layer in chain:
        layer.weight = Scaled(layer.weight.data)
    with pytest.raises(lading.ResidencyError, match=r"in '\d \(Scaled\)'.* run the model on the CPU"):
        opened(chain, plan, LazyDevice())
    assert not any(module._forward_pre_hooks for module in chain.modules())


def test_a_device_that_this_machine_lacks_is_refused_by_name():
    chain, plan, _ = chain_and_plan()
    if torch.accelerator.is_available():
        plan = lading.plan(chain, {torch.accelerator.device_count(): 10**6})
    with pytest.raises(lading.ResidencyError, match=r"found \d+ accelerators here"):
        lading.offload(chain, plan)
    assert not any(module._forward_pre_hooks for module in chain.modules())


def test_poison_would_be_seen():
    """A proof that these tests can fail: a slot read before its copy holds no number."""
    assert LazyDevice().allocate(8).view(torch.float32).isnan().all()
    assert POISON == 0xFF
