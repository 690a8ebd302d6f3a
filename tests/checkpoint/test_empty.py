"""Empty builds take no memory for parameters, keep buffers real, and remember how each parameter is made."""

from __future__ import annotations

import copy
import threading
import tracemalloc

import pytest
import torch
from handmade import bits
from torch import nn

import lading
from lading.checkpoint.empty import MetaWithoutInits, initialise, is_recipe
from lading.checkpoint.slots import settle_bytes
from lading.errors import MissingTensorError
from models import NETS, Plain, TiedParameters, ZerosAndOnes, build, example_input

WEIGHT_NORM_IS_OLD = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def real_parameters(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if not parameter.is_meta]


@pytest.mark.parametrize("net_class", NETS, ids=lambda net_class: net_class.__name__)
def test_empty_sends_every_parameter_to_meta_and_keeps_every_buffer_real(net_class):
    torch.manual_seed(0)
    reference = net_class()
    with lading.empty():
        net = net_class()
    assert real_parameters(net) == []
    assert type(net) is net_class
    expected = dict(reference.named_buffers(remove_duplicate=False))
    found = dict(net.named_buffers(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert not buffer.is_meta
        assert torch.equal(buffer, expected[name]), name
    for (name, ours), (other, theirs) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        assert (name, ours.shape, ours.dtype, ours.requires_grad) == (
            other,
            theirs.shape,
            theirs.dtype,
            theirs.requires_grad,
        )


@pytest.mark.parametrize("net_class", NETS, ids=lambda net_class: net_class.__name__)
def test_initialise_draws_what_the_class_itself_would_have_drawn(net_class):
    torch.manual_seed(7)
    reference = dict(net_class().named_parameters())
    with lading.empty():
        net = net_class()
    torch.manual_seed(7)
    values = initialise(dict(net.named_parameters()).values())
    for (name, expected), value in zip(reference.items(), values, strict=True):
        assert value is not None, f"{name} has no recipe"
        assert (value.dtype, bits(value)) == (expected.dtype, bits(expected)), name


def test_initialise_of_one_parameter_replays_only_what_it_depends_on():
    with lading.empty():
        net = ZerosAndOnes()
        other = nn.Linear(4096, 4096)
    assert initialise([net.eye])[0].equal(torch.eye(8))
    assert initialise([net.full])[0].equal(torch.full((8,), 3.0))
    assert initialise([net.scaled])[0].equal(1e-6 * torch.ones(8))
    state = torch.random.get_rng_state()
    assert initialise([net.zeros])[0].equal(torch.zeros(8))
    assert torch.equal(state, torch.random.get_rng_state()), "a draw for another parameter"
    assert other.weight.is_meta


def test_initialise_of_a_real_or_foreign_parameter_gives_none():
    assert initialise([nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(2, device="meta"))]) == [None, None]
    assert initialise([]) == []


def test_empty_draws_nothing_and_leaves_nothing_behind():
    from torch.nn.modules import module as nn_module

    hooks = (len(nn_module._global_parameter_registration_hooks), len(nn_module._global_buffer_registration_hooks))
    state = torch.random.get_rng_state()
    with lading.empty():
        nn.Linear(4, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (
        len(nn_module._global_parameter_registration_hooks),
        len(nn_module._global_buffer_registration_hooks),
    ) == hooks
    assert not nn.Linear(2, 2).weight.is_meta
    assert not torch.empty(2).is_meta


def test_empty_after_an_error_inside_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="mine"), lading.empty():
        raise RuntimeError("mine")
    assert not nn.Linear(2, 2).weight.is_meta


def test_empty_takes_no_memory_for_a_huge_module():
    tracemalloc.start()
    try:
        with lading.empty():
            net = nn.Sequential(*[nn.Linear(1 << 16, 1 << 16) for _ in range(50)])  # 860 GB
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert net[0].weight.shape == (1 << 16, 1 << 16)


def test_empty_acts_on_its_own_thread_only():
    inside, built = threading.Barrier(2), threading.Barrier(2)
    other: list[nn.Module] = []

    def work() -> None:
        inside.wait()
        other.append(ZerosAndOnes())
        built.wait()

    thread = threading.Thread(target=work)
    thread.start()
    with lading.empty():
        inside.wait()
        mine = ZerosAndOnes()
        built.wait()
    thread.join()
    assert real_parameters(mine) == []
    assert len(real_parameters(other[0])) == 5


def test_empty_inside_empty_works():
    with lading.empty():
        outer = nn.Linear(2, 2)
        with lading.empty():
            inner = nn.Linear(2, 2)
        after = nn.Linear(2, 2)
    assert [real_parameters(net) for net in (outer, inner, after)] == [[], [], []]
    assert all(value is not None for net in (outer, inner, after) for value in initialise(net.parameters()))


def test_empty_keeps_ties_one_object():
    with lading.empty():
        net = TiedParameters()
    assert net.head.weight is net.embedding.weight
    assert net.gain is net.norm.weight


def test_empty_with_layers_made_by_deepcopy_remembers_each(tmp_path):
    """`nn.TransformerEncoder` copies its one layer: the copies' initial values equal the first's."""
    with lading.empty():
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert real_parameters(net) == []
    values = dict(zip(dict(net.named_parameters()), initialise(net.parameters()), strict=True))
    assert [name for name, value in values.items() if value is None] == []
    assert torch.equal(values["layers.0.linear1.weight"], values["layers.1.linear1.weight"])


@WEIGHT_NORM_IS_OLD
def test_empty_with_the_old_weight_norm_sends_both_parts_to_meta():
    with lading.empty():
        net = nn.utils.weight_norm(nn.Linear(4, 4))
    assert sorted(dict(net.named_parameters())) == ["bias", "weight_g", "weight_v"]
    assert real_parameters(net) == []
    assert all(value is not None for value in initialise(net.parameters()))


def test_empty_with_numbers_asked_of_a_drawn_tensor_answers_truly():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            drawn = torch.rand(4) + 1
            self.is_positive = bool((drawn > 0).all())
            self.weight = nn.Parameter(drawn)
            self.register_buffer("drawn", torch.rand(3))

    with lading.empty():
        net = Asks()
    assert net.is_positive
    assert not net.drawn.is_meta
    assert net.drawn.shape == (3,)
    assert (initialise([net.weight])[0] >= 1).all()


def test_empty_keeps_attributes_of_parameters():
    with lading.empty():
        net = nn.Linear(2, 2)
        net.weight.note = "mine"
    assert net.weight.note == "mine"
    assert [name for name in vars(net.weight) if not is_recipe(name)] == ["note"]


def test_copying_an_empty_module_leaves_it_empty():
    with lading.empty():
        net = Plain()
    copied = copy.deepcopy(net)
    assert real_parameters(copied) == []
    assert real_parameters(net) == []


def test_settle_bytes_names_what_is_left_on_meta():
    with lading.empty():
        net = nn.Linear(2, 2)
    with pytest.raises(MissingTensorError) as caught:
        settle_bytes(net, {}, "net.safetensors")
    assert str(caught.value) == (
        "net.safetensors: found 'weight', 'bias' still on meta after loading · expected real tensors only · "
        "build the module inside `with lading.empty():`, which keeps its buffers real"
    )
    net = build(Plain)
    assert settle_bytes(net, {}, "x") == (0, sum(held.nbytes for held in net.state_dict().values()))


def test_meta_without_inits_builds_on_meta_and_leaves_real_tensors_to_torch():
    meta, real = torch.empty(4, device="meta"), torch.zeros(4)
    with MetaWithoutInits():
        assert {held.device.type for held in nn.BatchNorm1d(2).state_dict().values()} == {"meta"}
        assert nn.init.ones_(meta) is meta
        nn.init.ones_(real)
        nn.init.normal_(tensor=meta)
    assert real.tolist() == [1, 1, 1, 1]
    assert build(Plain)(example_input()).shape == (3, 8)
