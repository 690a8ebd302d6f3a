"""Prove that our `infer_auto_device_map` answers what accelerate's does, or better, and that accelerate could run it.

The models and budgets are those of accelerate's own tests (tests/test_modeling_utils.py, 1.15). Where the expectation
is another one than theirs, the test's name or a comment says what is better. `least_bytes` recomputes what a map asks
of each device by the rule of accelerate's hooks, from the modules alone.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import lading
from lading.adapters.accelerate import infer_auto_device_map
from lading.placement.plan import PlanWarning

needs_accelerate = pytest.mark.needs("accelerate")


def small_model() -> nn.Module:
    """Return three layers of 64, 72 (of which 40 are buffers) and 100 bytes."""
    return nn.Sequential(OrderedDict(linear1=nn.Linear(3, 4), batchnorm=nn.BatchNorm1d(4), linear2=nn.Linear(4, 5)))


def buffered_model() -> nn.Module:
    """Return the same with buffers: 64 + 80, 32 + 160, 100 + 120 bytes of parameters and buffers."""
    model = small_model()
    for layer, rows in zip(model, (2, 3, 3), strict=True):
        layer.register_buffer("extra", torch.zeros(10, rows))
    return model


def three_layers() -> nn.Module:
    """Return three small models of 236 bytes each."""
    return nn.Sequential(OrderedDict((f"layer{i}", small_model()) for i in (1, 2, 3)))


def sized(*sizes: int) -> nn.Module:
    """Return layers named A, B, C … of these sizes in units of 4 bytes."""
    return nn.Sequential(OrderedDict((chr(65 + i), nn.Linear(size, 1, bias=False)) for i, size in enumerate(sizes)))


def units(**budgets: int) -> dict[Any, int]:
    """Return budgets in units of 4 bytes; ``gpu0`` is accelerator 0."""
    return {int(key[3:]) if key.startswith("gpu") else key: 4 * size for key, size in budgets.items()}


@contextmanager
def no_warning():
    """Fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def home_of(device_map: dict[str, Any], name: str) -> Any:
    """Return the device of the longest key that stands for a tensor."""
    while name not in device_map:
        assert name, "a tensor has no device"
        name = name.rpartition(".")[0]
    return device_map[name]


def least_bytes(model: nn.Module, device_map: dict[str, Any], *, offload_buffers: bool = False) -> dict[Any, int]:
    """Return what each device must hold while accelerate's hooks run a map: of one tensor, its bytes once a device.

    What is offloaded runs on the accelerator with the lowest number, module by module; the buffers stay there.
    """
    accelerators = sorted(set(device_map.values()) - {"cpu", "disk"})
    main = accelerators[0] if accelerators else "cpu"
    away = {"cpu", "disk"} - {main}
    held: dict[Any, dict[int, int]] = {}
    fetched: dict[str, dict[int, int]] = {}
    for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in kind:
            home, is_buffer = home_of(device_map, name), not isinstance(tensor, nn.Parameter)
            held.setdefault(home, {})[id(tensor)] = tensor.nbytes
            if home in away and is_buffer and not offload_buffers:
                held.setdefault(main, {})[id(tensor)] = tensor.nbytes
            elif home in away:
                fetched.setdefault(name.rpartition(".")[0], {})[id(tensor)] = tensor.nbytes
    total = {device: sum(sizes.values()) for device, sizes in held.items()}
    total[main] = total.get(main, 0) + max((sum(sizes.values()) for sizes in fetched.values()), default=0)
    return total


def is_valid(model: nn.Module, device_map: dict[str, Any], budgets: dict[Any, int], **options: bool) -> bool:
    """Say whether no device holds more than its budget, and no tied group is parted."""
    names: dict[int, set[Any]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), set()).add(home_of(device_map, name))
    needed = least_bytes(model, device_map, **options)
    fits = all(size <= budgets.get(device, 0) for device, size in needed.items() if device != "disk")
    return fits and all(len(homes) == 1 for homes in names.values())


# -- the signature


@needs_accelerate
def test_signature_equals_accelerates():
    from accelerate.utils.modeling import infer_auto_device_map as theirs

    expected, found = (inspect.signature(each).parameters for each in (theirs, infer_auto_device_map))
    assert [(each.name, each.default, each.kind) for each in found.values()] == [
        (each.name, each.default, each.kind) for each in expected.values()
    ]
    assert type(infer_auto_device_map(small_model(), {0: 400})) is type(theirs(small_model(), {0: 400}))


# -- accelerate's cases


def test_two_devices_that_hold_everything_keep_no_reserve():
    """Accelerate leaves room for streaming on the first, although nothing is streamed: batchnorm goes to the second."""
    with no_warning():
        device_map = infer_auto_device_map(small_model(), max_memory={0: 200, 1: 200})
    assert device_map == {"linear1": 0, "batchnorm": 0, "linear2": 1}


def test_a_third_device_that_is_not_needed_gets_nothing():
    with no_warning():
        device_map = infer_auto_device_map(small_model(), max_memory={0: 200, 1: 172, 2: 200})
    assert device_map == {"linear1": 0, "batchnorm": 0, "linear2": 1}


def test_weights_tied_to_each_other_are_counted_once():
    model = small_model()
    model.linear1.weight = model.linear2.weight
    assert infer_auto_device_map(model, max_memory={0: 200, 1: 200}) == {"": 0}


def test_a_module_that_does_not_fit_is_split_at_its_layers():
    """Accelerate keeps 100 bytes free on device 0 and so splits the second of three; 236 + 236 fit into 500."""
    assert infer_auto_device_map(three_layers(), {0: 500, 1: 500}) == {"layer1": 0, "layer2": 0, "layer3": 1}
    device_map = infer_auto_device_map(three_layers(), max_memory={0: 400, 1: 400})
    assert device_map == {
        "layer1": 0, "layer2.linear1": 0, "layer2.batchnorm": 0, "layer2.linear2": 1, "layer3": 1,
    }  # fmt: skip


@pytest.mark.parametrize("classes", [["Sequential"], "Sequential", {"Sequential"}, ("Other", "Sequential")])
def test_classes_that_must_not_be_split_stay_whole(classes: Any):
    model = nn.ModuleList([small_model(), small_model(), small_model()])
    device_map = infer_auto_device_map(model, max_memory={0: 400, 1: 500}, no_split_module_classes=classes)
    assert device_map == {"0": 0, "1": 1, "2": 1}


def test_a_tied_group_stays_together_and_the_next_blocks_still_fill_its_device():
    """Accelerate sends the whole of layer2 on; two of its layers fit beside the tied group."""
    model, budgets = three_layers(), {0: 400, 1: 500}
    model.layer3.linear2.weight = model.layer1.linear2.weight
    device_map = infer_auto_device_map(model, budgets)
    assert device_map == {
        "layer1": 0, "layer3.linear2": 0, "layer2.linear1": 0, "layer2.batchnorm": 0,
        "layer2.linear2": 1, "layer3.linear1": 1, "layer3.batchnorm": 1,
    }  # fmt: skip
    assert is_valid(model, device_map, budgets)

    model.layer2.linear2.weight = model.layer1.linear2.weight  # three share one weight
    device_map = infer_auto_device_map(model, budgets)
    assert device_map == {
        "layer1": 0, "layer2.linear2": 0, "layer3.linear2": 0, "layer2.linear1": 0,
        "layer2.batchnorm": 1, "layer3.linear1": 1, "layer3.batchnorm": 1,
    }  # fmt: skip
    assert is_valid(model, device_map, budgets)

    model.layer2.linear1.weight = model.layer1.linear1.weight  # and a second group
    device_map = infer_auto_device_map(model, budgets)
    assert device_map == {"layer1": 0, "layer2": 0, "layer3.linear2": 0, "layer3.linear1": 1, "layer3.batchnorm": 1}
    assert is_valid(model, device_map, budgets)


def test_tied_modules_apart_in_order_share_a_device_and_leave_room_for_the_one_between():
    """Accelerate leaves 168 bytes for streaming on device 0, where linear2 fits: nothing is streamed."""
    model = nn.Sequential(OrderedDict((f"linear{i}", nn.Linear(4 + i % 2 * 2, 4 + i % 2 * 2)) for i in range(4)))
    model.linear2.weight, model.linear2.bias = model.linear0.weight, model.linear0.bias
    device_map = infer_auto_device_map(model, max_memory={0: 250, 1: 400})
    assert device_map == {"linear0": 0, "linear2": 0, "linear1": 0, "linear3": 1}


class SharesItsWeight(nn.Linear):
    """A layer with a child whose name begins like its own weight's, and which holds that weight too."""

    def __init__(self) -> None:
        super().__init__(3, 8)
        self.weight_child = nn.Module()
        self.weight_child.register_parameter("parameter", self.weight)


def test_a_name_that_begins_like_a_tied_weight_is_another_module():
    model = nn.Sequential(OrderedDict(compute=SharesItsWeight()))
    with pytest.warns(PlanWarning, match="device 0 got nothing: with 128 bytes"):
        device_map = infer_auto_device_map(model, {0: 4, "cpu": 96000})
    assert device_map == {"": "cpu"}
    assert infer_auto_device_map(model, {0: 128}, clean_result=False) == {
        "compute.weight": 0, "compute.bias": 0, "compute.weight_child": 0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.float16"])
def test_t0pp_keeps_its_tied_embeddings_together_where_most_fits(dtype: torch.dtype | str):
    """Accelerate keeps them on device 0 and so 18.79 GB on both devices; streaming them makes room for blocks."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    budgets = {0: 10**10, 1: 10**10, "cpu": 10**10}
    kept = {name: "float32" for name, _ in model.named_parameters() if "wo" in name}
    device_map = infer_auto_device_map(
        model, budgets, no_split_module_classes=["T5Block"], dtype=dtype, special_dtypes=kept
    )
    assert device_map["shared"] == device_map["encoder.embed_tokens"] == device_map["decoder.embed_tokens"] == "cpu"
    assert set(device_map.values()) == {0, 1, "cpu"}
    assert all(len(key.split(".")) <= 3 for key in device_map), "a block was split"
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in kept else torch.float16)
    assert is_valid(model, device_map, budgets)
    assert resident_bytes(model, device_map) > 19.3e9


def test_buffers_of_offloaded_layers_count_on_the_main_device():
    """Accelerate warns and returns linear1 → 0, which would take 524 of 400 bytes; here the CPU runs the model."""
    theirs = {"linear1": 0, "batchnorm": "cpu", "linear2": "cpu"}
    assert least_bytes(buffered_model(), theirs)[0] == 524
    with pytest.warns(PlanWarning, match="device 0 got nothing: with 492 bytes"):
        assert infer_auto_device_map(buffered_model(), {0: 400, "cpu": "1GB"}) == {"": "cpu"}
    with no_warning():
        assert infer_auto_device_map(buffered_model(), {0: 400, "cpu": "1GB"}, offload_buffers=True) == theirs


def with_a_fourth_layer() -> nn.Module:
    """Return the buffered model with a layer of 100 + 80 bytes more."""
    model = buffered_model()
    model.append(nn.Linear(4, 5))
    model[3].register_buffer("extra", torch.zeros(10, 2))
    return model


def test_two_devices_that_hold_all_buffers_hold_all_layers_too():
    """Accelerate sends the last two layers to the CPU."""
    with no_warning():
        device_map = infer_auto_device_map(with_a_fourth_layer(), {0: 400, 1: 400, "cpu": "1GB"})
    assert device_map == {"linear1": 0, "batchnorm": 0, "linear2": 1, "3": 1}


def test_buffers_that_no_device_holds_need_offload_buffers():
    """Accelerate warns and returns the second answer for both."""
    model, budgets = with_a_fourth_layer(), {0: 400, 1: 200, "cpu": "1GB"}
    with pytest.warns(PlanWarning, match="device . got nothing"):
        assert infer_auto_device_map(model, budgets) == {"": "cpu"}
    with no_warning():
        device_map = infer_auto_device_map(model, budgets, offload_buffers=True)
    assert device_map == {"linear1": "cpu", "batchnorm": 1, "linear2": 0, "3": "cpu"}  # accelerate keeps the smaller


@pytest.mark.parametrize("fallback", [False, True])
def test_fallback_allocation_changes_nothing_since_what_fits_is_found_anyway(fallback: bool):
    """Accelerate keeps nothing without it, and the same layer with it."""
    inner = nn.Sequential(OrderedDict(linear1=nn.Linear(10, 4), linear2=nn.Linear(4, 4), linear3=nn.Linear(4, 8)))
    model = nn.Sequential(OrderedDict(module=inner))
    with no_warning():
        device_map = infer_auto_device_map(model, max_memory={0: 256}, fallback_allocation=fallback)
    assert device_map == {"module.linear1": "disk", "module.linear2": 0, "module.linear3": "disk"}


def test_a_device_too_small_for_any_layer_is_refused_with_the_missing_bytes():
    """Accelerate sends everything to the disk, which its `dispatch_model` runs on a CPU that was given no memory."""
    inner = nn.Sequential(OrderedDict((f"linear{i}", nn.Linear(10, 10)) for i in (1, 2, 3)))
    with pytest.raises(lading.PlanError, match=r"850 bytes .*more on 0 or 880 bytes .*more on 'cpu'"):
        infer_auto_device_map(nn.Sequential(OrderedDict(module=inner)), {0: 30}, fallback_allocation=True)


def test_half_a_module_is_kept_where_the_whole_does_not_fit():
    pairs = (nn.Sequential(OrderedDict(one=nn.Linear(20, 20), two=nn.Linear(20, 20))) for _ in range(3))
    device_map = infer_auto_device_map(nn.Sequential(*pairs), {0: 5000}, fallback_allocation=True)
    assert device_map == {"0.one": 0, "0.two": "disk", "1": "disk", "2": "disk"}


def test_tied_layers_that_fit_together_are_kept_together():
    model = nn.Sequential(OrderedDict(linear1=nn.Linear(10, 10), linear2=nn.Linear(10, 10)))
    model.linear2.weight = model.linear1.weight
    assert infer_auto_device_map(model, max_memory={0: 600}, fallback_allocation=True) == {"": 0}


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers_that_fit_beside_the_streamed_layers_give_no_warning(offload_buffers: bool):
    """The same map as accelerate's. It warns of 40 bytes of buffers, having added them to its reserve twice."""
    model = nn.Sequential(
        OrderedDict(linear1=nn.Linear(10, 10), batchnorm=nn.BatchNorm1d(10), linear2=nn.Linear(10, 10))
    )
    for layer in model:
        layer.register_buffer("extra", torch.zeros(5))
    with no_warning():
        device_map = infer_auto_device_map(
            model, max_memory={0: 678}, fallback_allocation=True, offload_buffers=offload_buffers
        )
    assert device_map == {"linear1": "disk", "batchnorm": 0, "linear2": "disk"}
    assert least_bytes(model, device_map)[0] == 188 + 440 + 40


# -- the examples that issue 3 settles: A, B, C of 2, 1, 3 units


def test_two_devices_hold_a_and_b_then_c():
    with no_warning():
        device_map = infer_auto_device_map(sized(2, 1, 3), units(gpu0=4, gpu1=10, cpu=6))
    assert device_map == {"A": 0, "B": 0, "C": 1}


def test_a_first_layer_too_large_for_the_first_device_leaves_it_to_the_rest():
    """Accelerate never returns to device 0."""
    with no_warning():
        device_map = infer_auto_device_map(sized(5, 1, 3), units(gpu0=4, gpu1=10, cpu=6))
    assert device_map == {"A": 1, "B": 0, "C": 0}


@pytest.mark.parametrize("fallback", [False, True])
def test_one_device_keeps_b_because_c_must_still_fit_beside_it(fallback: bool):
    device_map = infer_auto_device_map(sized(2, 1, 3), units(gpu0=4, cpu=6), fallback_allocation=fallback)
    assert device_map == {"A": "cpu", "B": 0, "C": "cpu"}


# -- what the arguments mean


def test_accelerators_are_used_in_the_order_of_their_numbers():
    assert infer_auto_device_map(small_model(), {1: 1000, 0: 1000}) == {"": 0}
    assert infer_auto_device_map(small_model(), {"cpu": 1000, "cuda:1": 200, "cuda:0": 100}) == {
        "linear1": 0, "batchnorm": 1, "linear2": 1,
    }  # fmt: skip


def test_sizes_are_read_and_the_mapping_stays_as_it_was():
    budgets = {0: "200B", 1: "0.2KB", "cpu": "1GiB"}
    before = dict(budgets)
    assert infer_auto_device_map(small_model(), budgets) == {"linear1": 0, "batchnorm": 0, "linear2": 1}
    assert budgets == before


def test_no_memory_given_asks_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lading.adapters.accelerate.free_memory", lambda: {0: 100, "cpu": 1000})
    with pytest.warns(PlanWarning, match="got nothing"):
        assert infer_auto_device_map(small_model()) == {"": "cpu"}


def test_a_dtype_wider_than_the_weights_counts_as_wide():
    """Accelerate counts the narrower of the two."""
    assert infer_auto_device_map(small_model().half(), {0: 240, "cpu": 1000}, dtype="float32") == {"": 0}
    with pytest.warns(PlanWarning, match=r"with 4 bytes \(4 B\) more on device 0"):
        device_map = infer_auto_device_map(small_model().half(), {0: 232, "cpu": 1000}, dtype="float32")
    assert "cpu" in device_map.values()


def test_special_dtypes_are_ahead_of_dtype():
    model, special = small_model(), {"linear2.weight": "float32"}
    assert infer_auto_device_map(model, {0: 64 // 2 + 40 + 10 + 80}, dtype="float16", special_dtypes=special) == {"": 0}
    with pytest.raises(lading.PlanError):
        infer_auto_device_map(model, {0: 64 // 2 + 9 + 80}, dtype="float16", special_dtypes=special)


@needs_accelerate
def test_numbers_narrower_than_a_byte_are_counted_in_bits():
    from accelerate.utils import CustomDtype

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()  # 12 + 4 and 16 + 4 numbers
    assert infer_auto_device_map(model, {0: 6 + 2 + 8 + 2}, dtype=CustomDtype.INT4) == {"": 0}
    special = {"0.weight": CustomDtype.INT2, "1.weight": torch.float16, "1.bias": CustomDtype.FP8}
    assert infer_auto_device_map(model, {0: 3 + 2 + 32 + 4}, dtype=CustomDtype.INT4, special_dtypes=special) == {"": 0}
    with pytest.raises(lading.PlanError):
        infer_auto_device_map(model, {0: 17}, dtype=CustomDtype.INT4)


def test_a_limited_disk_is_not_exceeded():
    """Accelerate ignores the limit."""
    assert infer_auto_device_map(small_model(), {0: 180, "disk": 164})["linear2"] == "disk"
    with pytest.raises(lading.PlanError, match=r"154 bytes .*more on 'disk'"):
        infer_auto_device_map(small_model(), {0: 180, "disk": 10})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float17"}, "dtype: found 'float17'"),
        ({"special_dtypes": {"linear1.weight": 3}}, "dtype: found 3"),
        ({"max_memory": {0: "5MBB"}}, "max_memory of device 0: found '5MBB'"),
        ({"max_memory": {"gpu": 5}}, "max_memory: found device 'gpu'"),
        ({"max_memory": {}}, "room for cpu: 0 B"),
    ],
)
def test_an_argument_that_is_not_understood_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(lading.PlanError, match=message):
        infer_auto_device_map(**{"model": small_model(), "max_memory": {0: 1000}, **arguments})


def test_clean_result_false_names_every_block():
    model = three_layers()
    device_map = infer_auto_device_map(model, {0: 1000}, clean_result=False)
    assert list(device_map) == [f"layer{i}.{name}" for i in (1, 2, 3) for name in ("linear1", "batchnorm", "linear2")]
    assert infer_auto_device_map(model, {0: 1000}) == {"": 0}


def test_verbose_says_of_each_block_where_it_goes_and_why(capsys: pytest.CaptureFixture[str]):
    with no_warning():
        infer_auto_device_map(small_model(), {0: 180, "cpu": 1000}, verbose=True)
    printed = capsys.readouterr().out
    assert "Putting linear1 (size=64) on cpu: streamed: " in printed
    assert "Putting batchnorm (size=72) on 0: resident." in printed
    assert "Streamed blocks run on 0." in printed
    infer_auto_device_map(small_model(), {0: 180, "cpu": 1000})
    assert not capsys.readouterr().out


def test_a_model_without_tensors_gets_an_empty_map():
    assert infer_auto_device_map(nn.ReLU(), {0: 10}) == {}


# -- beside accelerate

SCENARIOS: list[dict[Any, int]] = [
    {0: 236}, {0: 200, 1: 200}, {0: 180, "cpu": 1000}, {0: 172, "cpu": 100}, {0: 100, 1: 300, "cpu": 300},
    {0: 700, 1: 300}, {0: 400, 1: 500}, {0: 300, 1: 200, 2: 300, "cpu": 500}, {0: 4, 1: 400, "cpu": 1000}, {"cpu": 250},
]  # fmt: skip


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budgets", SCENARIOS, ids=str)
@pytest.mark.parametrize("make", [small_model, buffered_model, three_layers, lambda: sized(5, 20, 8, 30, 8, 40)])
def test_every_answer_is_valid_and_keeps_no_less_than_a_valid_one_of_accelerate(make: Any, budgets: dict[Any, int]):
    from accelerate.utils.modeling import check_device_map
    from accelerate.utils.modeling import infer_auto_device_map as infer_theirs

    model = make()
    theirs = infer_theirs(model, dict(budgets))
    is_theirs_valid = is_valid(model, theirs, budgets)
    try:
        ours = infer_auto_device_map(model, budgets)
    except lading.PlanError:
        assert not is_theirs_valid
        return
    check_device_map(model, ours)
    assert is_valid(model, ours, budgets)
    assert not is_theirs_valid or resident_bytes(model, ours) >= resident_bytes(model, theirs)


def resident_bytes(model: nn.Module, device_map: dict[str, Any]) -> int:
    """Return the bytes of parameters that rest on accelerators, or on the CPU where there is none."""
    main = "cpu" if not set(device_map.values()) - {"cpu", "disk"} else None
    away = {"cpu", "disk"} - {main}
    return sum(each.nbytes for name, each in model.named_parameters() if home_of(device_map, name) not in away)


def test_accelerate_itself_is_not_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert infer_auto_device_map(small_model(), {0: 1000}) == {"": 0}
