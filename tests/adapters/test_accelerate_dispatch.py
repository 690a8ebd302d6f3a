"""Prove that accelerate's big-model calls run here with real weights inside the model, and the same bits.

The cases are those of accelerate's own tests (tests/test_big_modeling.py, 1.15), on the maps that a machine without an
accelerator can run. Where they assert meta, a real CPU tensor is asserted; what accelerate computes is the reference.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_nets import Small, quiet_accelerate  # noqa: F401 - a fixture
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from lading.adapters import accelerate as ours
from lading.adapters.accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from lading.residency.residency import Residency

needs_accelerate = pytest.mark.needs("accelerate")


class LinearWithNonPersistentBuffers(nn.Module):
    """A layer whose bias is a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4).normal_())
        self.register_buffer("bias", torch.empty(4).normal_(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class WithNonPersistentBuffers(nn.Module):
    """Small, with that layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.linear2 = LinearWithNonPersistentBuffers()
        self.linear3 = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear3(self.linear2(self.linear1(x)))


class UsesWithoutCalling(nn.Module):
    """A module that reads the weights of its child and never calls it."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.linear.weight.t() + self.linear.bias


class WithUnusedSubmodules(nn.Module):
    """Four layers, two of which are of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = UsesWithoutCalling(3, 4)
        self.linear2 = nn.Linear(4, 5)
        self.batchnorm = nn.BatchNorm1d(5)
        self.linear3 = UsesWithoutCalling(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear3(self.batchnorm(self.linear2(self.linear1(x))))


class Bigger(nn.Module):
    """Several layers in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.linear2 = nn.Linear(4, 5)
        self.batchnorm = nn.BatchNorm1d(5)
        self.block1 = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6))
        self.block2 = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block2(self.block1(self.batchnorm(self.linear2(self.linear1(x)))))


class BiggerTied(nn.Module):
    """The first and the last weight are one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(5, 5)
        self.linear2 = nn.Linear(5, 5)
        self.batchnorm = nn.BatchNorm1d(5)
        self.linear3 = nn.Linear(5, 5)
        self.linear3.weight = self.linear1.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear3(self.batchnorm(self.linear2(self.linear1(x))))


class DirectParameter(nn.Module):
    """A parameter of the model's own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


X = {Small: (2, 3), WithNonPersistentBuffers: (2, 3), WithUnusedSubmodules: (2, 3), Bigger: (2, 3)}
X |= {BiggerTied: (2, 5), DirectParameter: (2, 3)}
MAPS: list[tuple[type[nn.Module], dict[str, str]]] = [
    (Small, {"": "disk"}),
    (Small, {"linear1": "disk", "batchnorm": "cpu", "linear2": "cpu"}),
    (Small, {"linear1": "disk", "batchnorm": "cpu", "linear2": "disk"}),
    (Small, {"linear1": "cpu", "batchnorm": "disk", "linear2": "cpu"}),
    (Small, {"linear1": "cpu", "batchnorm": "cpu", "linear2": "cpu"}),
    (WithNonPersistentBuffers, {"linear1": "cpu", "linear2": "disk", "linear3": "disk"}),
    (Bigger, {"linear1": "cpu", "linear2": "disk", "batchnorm": "cpu", "block1": "disk", "block2": "disk"}),
    (Bigger, {"linear1": "cpu", "linear2": "cpu", "batchnorm": "cpu", "block1": "disk", "block2": "cpu"}),
    (BiggerTied, {"linear1": "disk", "linear2": "cpu", "batchnorm": "cpu", "linear3": "disk"}),
]
OVER_MAPS = pytest.mark.parametrize(("net_class", "device_map"), MAPS)


def build(net_class: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return net_class().eval()


def inputs(net_class: type[nn.Module]) -> torch.Tensor:
    return torch.randn(X[net_class], generator=torch.Generator().manual_seed(1))


def assert_real(model: nn.Module, like: nn.Module) -> None:
    """Assert that every tensor is on the CPU with the bits of the other model's."""
    expected = {**dict(like.named_parameters(remove_duplicate=False)), **dict(like.named_buffers())}
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert list(model.state_dict()) == list(like.state_dict())


def close(model: nn.Module) -> None:
    residency = Residency.of(model)
    if residency is not None:
        residency.close()


# -- the signatures


@needs_accelerate
@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload", "dispatch_model", "load_checkpoint_and_dispatch"])
def test_adapter_has_the_parameters_of_accelerate(name):
    import accelerate

    theirs = inspect.signature(getattr(accelerate, name)).parameters
    found = inspect.signature(getattr(ours, name)).parameters
    assert [(each.name, each.default, each.kind) for each in found.values()] == [
        (each.name, each.default, each.kind) for each in theirs.values()
    ]


# -- dispatch_model


@needs_accelerate
@OVER_MAPS
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_dispatch_model_gives_what_accelerate_gives(tmp_path, net_class, device_map, offload_buffers):
    import accelerate

    plain, model, x = build(net_class), build(net_class), inputs(net_class)
    expected = plain(x)
    theirs = build(net_class)
    accelerate.dispatch_model(theirs, device_map, offload_dir=tmp_path, offload_buffers=offload_buffers) if (
        "" not in device_map
    ) else accelerate.disk_offload(theirs, tmp_path, offload_buffers=offload_buffers)
    assert torch.equal(theirs(x), expected)
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert dispatch_model(model, device_map, offload_buffers=offload_buffers) is model  # and no folder
    assert model.hf_device_map == device_map
    for _ in range(3):
        assert torch.equal(model(x), expected)
        assert_real(model, plain)
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == before
    assert (Residency.of(model) is not None) == ("disk" in device_map.values())
    close(model)
    assert torch.equal(model(x), expected)


@OVER_MAPS
def test_dispatch_model_closed_leaves_nothing(net_class, device_map):
    model = build(net_class)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    dispatch_model(model, device_map)
    if "disk" not in device_map.values():
        assert vars(model).pop("hf_device_map") == device_map
    close(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dispatch_model_keeps_tied_weights_one():
    model, x = build(BiggerTied), inputs(BiggerTied)
    expected = model(x)
    dispatch_model(model, {"linear1": "disk", "linear2": "cpu", "batchnorm": "cpu", "linear3": "disk"})
    assert model.linear3.weight is model.linear1.weight
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        model.linear1.weight.mul_(2)
    assert not torch.equal(model(x), expected)
    assert torch.equal(model.linear3.weight, model.linear1.weight)


def test_dispatch_model_refuses_a_map_that_parts_tied_weights():
    device_map = {"linear1": "cpu", "linear2": "cpu", "batchnorm": "cpu", "linear3": "disk"}
    with pytest.raises(lading.PlanError, match="tied tensors on several devices: 'linear1' and 'linear3'"):
        dispatch_model(build(BiggerTied), device_map)


@pytest.mark.parametrize("preload", [None, ["UsesWithoutCalling"], ["UsesWithoutCalling", "Linear", "NoSuchClass"]])
def test_dispatch_model_runs_submodules_that_are_read_and_not_called(preload):
    model, x = build(WithUnusedSubmodules), inputs(WithUnusedSubmodules)
    expected = model(x)
    dispatch_model(model, {"": "disk"}, preload_module_classes=preload)
    assert torch.equal(model(x), expected)
    keys = {key for placement in Residency.of(model).plan.placements for key in placement.keys}
    assert ("linear1" in keys) == (preload is not None)
    assert ("linear1.linear" in keys) == (preload is None)


def test_dispatch_model_refuses_a_map_that_goes_inside_a_class_to_preload():
    device_map = {"linear1.linear": "disk", "linear2": "cpu", "batchnorm": "cpu", "linear3": "cpu"}
    with pytest.raises(lading.PlanError, match="devices for parts of UsesWithoutCalling"):
        dispatch_model(build(WithUnusedSubmodules), device_map, preload_module_classes=["UsesWithoutCalling"])


def test_dispatch_model_splits_a_declared_class_where_the_map_does():
    model, x = build(Bigger), inputs(Bigger)
    model._no_split_modules = ["Sequential"]
    expected = model(x)
    parts = {"linear1": "cpu", "linear2": "cpu", "batchnorm": "cpu", "block1.0": "disk", "block1.2": "cpu"}
    dispatch_model(model, {**parts, "block2": "disk"})
    assert torch.equal(model(x), expected)


def test_dispatch_model_places_a_parameter_of_the_models_own():
    model, x = build(DirectParameter), inputs(DirectParameter)
    expected = model(x)
    dispatch_model(model, {"scale": "cpu", "linear": "disk"})
    assert torch.equal(model(x), expected)


def test_dispatch_model_moves_tensors_in_and_out_of_a_copy():
    model, x = build(Small), inputs(Small)
    expected = model(x)
    dispatch_model(model, {"linear1": "disk", "batchnorm": "cpu", "linear2": "disk"})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.linear1.weight.zero_()
        assert torch.equal(model(x), expected)


def test_dispatch_model_may_be_moved_to_where_it_is():  # accelerate raises: its weights are on meta
    model, x = build(Small), inputs(Small)
    expected = model(x)
    dispatch_model(model, {"": "disk"})
    assert torch.equal(model.to("cpu")(x), expected)


def test_dispatch_model_runs_from_many_threads():  # accelerate swaps the weights of one under the other
    model, x = build(Bigger), inputs(Bigger)
    expected = model(x)
    dispatch_model(model, {"": "disk"})
    wrong: list[Any] = []

    def call() -> None:
        for _ in range(50):
            try:
                if not torch.equal(model(x), expected):
                    wrong.append("output")
            except Exception as error:  # noqa: BLE001 - collected
                wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_dispatch_model_ends_with_the_model():
    model = dispatch_model(build(Small), {"": "disk"})
    model(inputs(Small))
    residency, gone = Residency.of(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    residency.close()


def test_dispatch_model_with_force_hooks_hooks_nothing_that_stays():
    model = dispatch_model(build(Small), {"": "cpu"}, force_hooks=True)
    assert Residency.of(model) is None
    assert model.hf_device_map == {"": "cpu"}


@pytest.mark.parametrize("main_device", ["cpu", torch.device("cpu"), None])
def test_dispatch_model_takes_a_main_device(main_device):
    model, x = build(Small), inputs(Small)
    expected = model(x)
    dispatch_model(model, {"": "disk"}, main_device=main_device, skip_keys="cache", force_hooks=True)
    assert torch.equal(model(x), expected)
    assert Residency.of(model).plan.main_device == "cpu"


@pytest.mark.parametrize(
    ("device_map", "options", "error", "message"),
    [
        ({"linear1": "cpu"}, {}, lading.PlanError, "no device for 'batchnorm', 'linear2'"),
        ({"": "disk"}, {"main_device": "disk"}, lading.PlanError, "main_device: found 'disk'"),
        ({"": "disk"}, {"main_device": "meta"}, lading.PlanError, "meta"),
        ({"": "diskk"}, {}, lading.PlanError, "diskk"),
        ("auto", {}, lading.PlanError, "device_map: found 'auto'.*load_checkpoint_and_dispatch"),
        ({"": 99}, {}, lading.ResidencyError, "device 99"),
        ({"linear1": 99, "batchnorm": "cpu", "linear2": "disk"}, {}, lading.ResidencyError, "device 99"),
        ({"": "cpu"}, {"main_device": 99}, lading.ResidencyError, "device 99"),
        (
            {"": "cpu"},
            {"state_dict": {"linear.weight": torch.ones(1)}},
            lading.ResidencyError,
            "state_dict: .*linear.wei",
        ),
        ({"": "cpu"}, {"state_dict": {"linear1.weight": torch.ones(1)}}, lading.ResidencyError, "shapes: 'linear1.wei"),
    ],
)
def test_dispatch_model_refuses_and_leaves_the_model_as_it_was(device_map, options, error, message):
    model, x = build(Small), inputs(Small)
    expected = model(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        dispatch_model(model, device_map, **options)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert_real(model, build(Small))
    assert torch.equal(model(x), expected)


def test_dispatch_model_twice_is_refused_with_the_way_out():
    model = dispatch_model(build(Small), {"": "disk"})
    with pytest.raises(lading.ResidencyError, match=r"open residency.*close"):
        dispatch_model(model, {"": "disk"})
    close(model)
    dispatch_model(model, {"": "disk"})


@needs_accelerate
def test_dispatch_model_refuses_what_accelerate_hooked(tmp_path):
    import accelerate

    model = accelerate.disk_offload(build(Small), tmp_path)
    with pytest.raises(lading.ResidencyError, match="replace_hooks=True"):
        dispatch_model(model, {"": "disk"})


def empty(net_class: type[nn.Module]) -> nn.Module:
    with lading.empty():
        return net_class().eval()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "disk"}])
def test_dispatch_model_takes_the_weights_of_a_state_dict(device_map):
    plain, x = build(Small), inputs(Small)
    state = plain.state_dict()
    model = dispatch_model(empty(Small), device_map, state_dict=state)
    assert torch.equal(model(x), plain(x))
    assert_real(model, plain)
    other = Small().eval()
    held = dict(other.named_parameters())
    dispatch_model(other, device_map, state_dict=state)
    assert torch.equal(other(x), plain(x))
    assert all(parameter is held[name] for name, parameter in other.named_parameters())


def test_dispatch_model_names_the_weights_that_are_nowhere():
    state = build(Small).state_dict()
    del state["linear2.bias"]
    model = empty(Small)
    with pytest.raises(lading.ResidencyError, match=r"no data for 'linear2.bias'"):
        dispatch_model(model, {"": "disk"}, state_dict=state)
    assert model.linear1.weight.is_meta


@needs_accelerate
def test_dispatch_model_takes_weights_that_accelerate_wrote(tmp_path):
    from accelerate.utils import offload_state_dict

    plain, x = build(Small), inputs(Small)
    offload_state_dict(tmp_path, plain.state_dict())
    model = dispatch_model(empty(Small), {"": "disk"}, offload_dir=tmp_path)
    assert torch.equal(model(x), plain(x))
    assert Residency.of(model).stats().spilled_bytes == 0
    assert_real(model, plain)
    same = dispatch_model(build(Small), {"": "disk"}, offload_dir=tmp_path)  # a folder of the same weights is no harm
    assert torch.equal(same(x), plain(x))
    other = Small().eval()
    with pytest.raises(lading.ResidencyError, match=r"offload folder .*other values of 'linear1.weight'"):
        dispatch_model(other, {"": "disk"}, offload_dir=tmp_path)


def test_dispatch_model_views_the_entries_of_an_offload_index(tmp_path):
    plain, x = build(Small), inputs(Small)
    save_file({f"m.{name}": tensor for name, tensor in plain.state_dict().items()}, tmp_path / "w.safetensors")
    entry = {"safetensors_file": str(tmp_path / "w.safetensors")}
    index = {name: {**entry, "weight_name": f"m.{name}"} for name in plain.state_dict()}
    model = dispatch_model(empty(Small), {"": "disk"}, offload_index=index)
    assert torch.equal(model(x), plain(x))
    assert Residency.of(model).stats().spilled_bytes == 0


# -- cpu_offload, disk_offload


@needs_accelerate
@pytest.mark.parametrize("net_class", list(X))
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload_and_disk_offload_give_what_accelerate_gives(tmp_path, net_class, offload_buffers):
    import accelerate

    preload = ["UsesWithoutCalling"]
    plain, x = build(net_class), inputs(net_class)
    expected = plain(x)
    options = {"offload_buffers": offload_buffers, "preload_module_classes": preload}
    pairs: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        (accelerate.cpu_offload, cpu_offload, ()),
        (accelerate.disk_offload, disk_offload, (tmp_path,)),
    ]
    for theirs, here, args in pairs:
        reference = build(net_class)
        theirs(reference, *args, **options)
        assert torch.equal(reference(x), expected)
        for execution_device in (None, "cpu", torch.device("cpu")):
            model = build(net_class)
            assert here(model, *args, execution_device=execution_device, **options) is model
            assert torch.equal(model(x), expected)
            assert_real(model, plain)  # accelerate: meta
            close(model)
            assert torch.equal(model(x), expected)


def test_cpu_offload_on_the_cpu_hooks_nothing_and_takes_a_state_dict():
    plain, x = build(Small), inputs(Small)
    model = cpu_offload(empty(Small), state_dict=plain.state_dict())
    assert Residency.of(model) is None
    assert torch.equal(model(x), plain(x))


def test_disk_offload_writes_no_second_copy_of_a_mapped_checkpoint(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    lading.load_into(model, tmp_path / "w.safetensors")
    disk_offload(model, tmp_path / "off")
    assert torch.equal(model(torch.ones(1, 64)), plain(torch.ones(1, 64)))
    assert Residency.of(model).stats().spilled_bytes == 0
    assert list((tmp_path / "off").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [cpu_offload, lambda model, device: disk_offload(model, None, device)])
def test_offload_runs_on_an_accelerator_and_returns_to_the_cpu(offload):
    model, x = build(Bigger), inputs(Bigger)
    expected = copy.deepcopy(model).to("cuda")(x.to("cuda")).cpu()
    offload(model, 0)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    close(model)
    assert_real(model, build(Bigger))


# -- load_checkpoint_and_dispatch


@pytest.fixture
def checkpoint(tmp_path):
    """Return a folder with the bigger model's weights in two shards, and an index under another name."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = list(build(Bigger).state_dict())
    parts = {"a.safetensors": names[:6], "b.safetensors": names[6:]}
    state = build(Bigger).state_dict()
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "other.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@needs_accelerate
@pytest.mark.parametrize("device_map", [each for net_class, each in MAPS if net_class is Bigger] + [None, {"": "cpu"}])
@pytest.mark.parametrize("make", ["empty", "real", "accelerate"])
def test_load_checkpoint_and_dispatch_gives_what_accelerate_gives(tmp_path, checkpoint, device_map, make):
    import accelerate

    plain, x = build(Bigger), inputs(Bigger)
    theirs = accelerate.load_checkpoint_and_dispatch(Bigger().eval(), checkpoint, device_map, offload_folder=tmp_path)
    assert torch.equal(theirs(x), plain(x))
    if make == "accelerate":
        with accelerate.init_empty_weights():
            model = Bigger().eval()
    else:
        model = empty(Bigger) if make == "empty" else Bigger().eval()
    assert load_checkpoint_and_dispatch(model, checkpoint, device_map) is model
    assert torch.equal(model(x), plain(x))
    assert_real(model, plain)
    assert getattr(model, "hf_device_map", None) == device_map
    if device_map and "disk" in device_map.values():
        assert Residency.of(model).stats().spilled_bytes == 0


@pytest.mark.parametrize("kind", ["file", "bin", "index", "folder"])
def test_load_checkpoint_and_dispatch_takes_every_form_of_a_checkpoint(tmp_path, checkpoint, kind):
    plain, x = build(Bigger), inputs(Bigger)
    path = {
        "file": tmp_path / "weights.safetensors",
        "bin": tmp_path / "pt_model.bin",
        "index": checkpoint / "other.index.json",
        "folder": checkpoint,
    }[kind]
    if kind == "file":
        save_file(plain.state_dict(), path)
    elif kind == "bin":
        torch.save(plain.state_dict(), path)
    model = load_checkpoint_and_dispatch(empty(Bigger), path, {"": "disk"}, strict=True)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("preload", [None, ["UsesWithoutCalling"]])
def test_load_checkpoint_and_dispatch_runs_submodules_that_are_read_and_not_called(tmp_path, preload):
    plain, x = build(WithUnusedSubmodules), inputs(WithUnusedSubmodules)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    device_map = {"linear1": "cpu", "linear2": "disk", "batchnorm": "cpu", "linear3": "disk"}
    model = load_checkpoint_and_dispatch(
        empty(WithUnusedSubmodules), tmp_path / "w.safetensors", device_map, preload_module_classes=preload
    )
    assert torch.equal(model(x), plain(x))
    assert_real(model, plain)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_load_checkpoint_and_dispatch_plans_within_max_memory(tmp_path, device_map):
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)])
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    with lading.empty():
        model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)])
    load_checkpoint_and_dispatch(model, tmp_path / "w.safetensors", device_map, {"cpu": "300KiB"})
    residency = Residency.of(model)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(model(torch.ones(1, 128)), plain(torch.ones(1, 128)))
    assert residency.stats().peak_bytes <= 300 << 10


@needs_accelerate
@pytest.mark.parametrize("dtype", [None, "float16", torch.bfloat16, "torch.float64"])
def test_load_checkpoint_and_dispatch_casts_as_accelerate_does(tmp_path, checkpoint, dtype):
    import accelerate

    device_map = {"": "cpu"}
    theirs = accelerate.load_checkpoint_and_dispatch(Bigger().eval(), checkpoint, device_map, dtype=dtype)
    model = load_checkpoint_and_dispatch(empty(Bigger), checkpoint, device_map, dtype=dtype)
    assert {name: each.dtype for name, each in model.state_dict().items()} == {
        name: each.dtype for name, each in theirs.state_dict().items()
    }
    assert_real(model, theirs)


def test_load_checkpoint_and_dispatch_keeps_the_dtype_of_the_checkpoint_with_auto(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in nn.Linear(4, 4).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with lading.empty():
        model = nn.Linear(4, 4)
    load_checkpoint_and_dispatch(model, tmp_path / "w.safetensors", {"": "disk"}, dtype="auto")
    assert model.weight.dtype == torch.bfloat16
    assert Residency.of(model).stats().spilled_bytes == 0


def test_load_checkpoint_and_dispatch_ties_from_one_stored_name(tmp_path):
    plain, x = build(BiggerTied), inputs(BiggerTied)
    state = plain.state_dict()
    del state["linear3.weight"]
    save_file(state, tmp_path / "w.safetensors")
    model = load_checkpoint_and_dispatch(empty(BiggerTied), tmp_path / "w.safetensors", {"": "disk"}, strict=True)
    assert model.linear3.weight is model.linear1.weight
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("strict", [False, True])
def test_load_checkpoint_and_dispatch_of_other_names_is_strict_on_demand(tmp_path, checkpoint, strict):
    state = load_file(checkpoint / "a.safetensors") | load_file(checkpoint / "b.safetensors")
    save_file({**state, "more": torch.ones(2)}, tmp_path / "w.safetensors")
    model = Bigger().eval()
    if strict:
        with pytest.raises(lading.CheckpointError, match="'more'"):
            load_checkpoint_and_dispatch(model, tmp_path / "w.safetensors", {"": "disk"}, strict=True)
        assert Residency.of(model) is None
    else:
        load_checkpoint_and_dispatch(model, tmp_path / "w.safetensors", {"": "disk"})
        assert_real(model, build(Bigger))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device_map": "best"}, lading.PlanError, "device_map: found 'best' · expected 'auto', 'balanced'"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"}}, lading.PlanError, "max_memory: found"),
        ({"max_memory": {"cpu": "1GiB"}}, lading.PlanError, "max_memory: found"),
        ({"broadcast_from_rank0": True}, lading.PlanError, "broadcast_from_rank0=True"),
        ({"full_state_dict": False}, lading.PlanError, "full_state_dict=False"),
        ({"device_map": {"linear1": "cpu"}}, lading.PlanError, "no device for 'linear2'"),
        ({"device_map": "auto", "max_memory": {"cpu": 10}}, lading.PlanError, "more on 'cpu'"),
        ({"dtype": "float7"}, lading.PlanError, "float7"),
    ],
)
def test_load_checkpoint_and_dispatch_refuses_and_leaves_the_model_as_it_was(checkpoint, options, error, message):
    model = Bigger().eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_checkpoint_and_dispatch(model, checkpoint, **options)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
