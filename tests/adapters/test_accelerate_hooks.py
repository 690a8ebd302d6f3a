"""Prove that a model which accelerate hooked is taken over whole: every weight and bit back, nothing left behind.

The references are the model before accelerate touched it, and accelerate's own run of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate_nets import Small as Net
from accelerate_nets import quiet_accelerate  # noqa: F401 - a fixture
from safetensors.torch import save_file
from torch import nn

import lading
from models import NETS, ExtraState, build, example_input
from zoo import BY_NAME, QUIET, Directory, tensors

pytestmark = [pytest.mark.needs("accelerate"), *QUIET]


class Tied(nn.Module):
    """Two layers that are one weight, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


DISK = {"": "disk"}
MIXED = {"linear1": "disk", "batchnorm": "cpu", "linear2": "disk"}
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: copy.deepcopy(tensor) for name, tensor in model.state_dict().items()}


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of what each module holds of its own, hooks included."""
    kept = {name: set(vars(module)) for name, module in model.named_modules(remove_duplicate=False)}
    hooks = {
        f"{name} hooks": {str(key) for key in [*module._forward_pre_hooks, *module._forward_hooks]}
        for name, module in model.named_modules()
    }
    return {**kept, **hooks}


def all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def assert_whole(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Assert that every tensor is real and has the bits that it had."""
    assert not [name for name, tensor in all_tensors(model) if tensor.is_meta]
    found = model.state_dict()
    assert list(found) == list(state)
    tensors_of = {name for name in state if isinstance(state[name], torch.Tensor)}
    assert [name for name in tensors_of if not torch.equal(found[name], state[name])] == []


def snapshot(model: nn.Module) -> list[Any]:
    """Return what every module holds, to compare by identity."""
    return [
        (name, key, id(value)) for name, module in model.named_modules() for key, value in sorted(vars(module).items())
    ] + [(name, id(tensor)) for name, tensor in [*model.named_parameters(), *model.named_buffers()]]


def test_offload_of_a_hooked_model_is_refused_with_the_way_out(tmp_path):
    import accelerate

    model = accelerate.dispatch_model(net(), MIXED, offload_dir=tmp_path)
    before = snapshot(model)
    with pytest.raises(lading.ResidencyError, match=r"hooks of accelerate on .*'linear1'.*replace_hooks=True"):
        lading.offload(model, DISK)
    assert snapshot(model) == before


@pytest.mark.parametrize("is_run", [False, True], ids=["fresh", "run before"])
@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("plan", [DISK, MIXED, {"": "cpu"}], ids=["disk", "mixed", "cpu"])
def test_offload_takes_over_what_dispatch_model_hooked(tmp_path, is_run, offload_buffers, plan):
    import accelerate

    model = net()
    before, state, expected = attributes(model), copied(model), model(X)
    accelerate.dispatch_model(model, MIXED, offload_dir=tmp_path, offload_buffers=offload_buffers)
    if is_run:
        assert torch.equal(model(X), expected)
    with lading.offload(model, plan, replace_hooks=True) as residency:
        assert torch.equal(model(X), expected)
        assert_whole(model, state)
        away = 2 * (16 + 63) if plan is DISK else 0  # batchnorm was in memory; addresses keep their remainder
        assert residency.stats().spilled_bytes <= away
        assert model.hf_device_map == plan
    assert attributes(model) == before
    assert_whole(model, state)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("preload", [None, ["Net"]])
def test_offload_takes_over_cpu_offload_and_disk_offload(tmp_path, preload):
    import accelerate

    for hook in (accelerate.cpu_offload, lambda m, **rest: accelerate.disk_offload(m, tmp_path / "off", **rest)):
        model = net()
        before, state, expected = attributes(model), copied(model), model(X)
        hook(model, preload_module_classes=preload)
        assert model.linear1.weight.is_meta
        with lading.offload(model, DISK, replace_hooks=True):
            assert torch.equal(model(X), expected)
        assert attributes(model) == before
        assert_whole(model, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8])
def test_offload_takes_over_every_element_type_of_dat_files(tmp_path, dtype):
    import accelerate

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.arange(16).view(4, 4).to(dtype), requires_grad=False)
    model[0].register_buffer("scalar", torch.tensor(7))
    state = copied(model)
    accelerate.disk_offload(model, tmp_path, offload_buffers=True)
    lading.offload(model, DISK, replace_hooks=True).close()
    assert model[0].weight.dtype == dtype
    assert not model[0].weight.requires_grad
    assert_whole(model, state)


def test_offload_maps_dat_files_and_writes_nothing(tmp_path):
    import accelerate

    model = nn.Sequential(nn.Linear(64, 64))
    accelerate.dispatch_model(model, {"0": "disk"}, offload_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with lading.offload(model, DISK, replace_hooks=True) as residency, torch.no_grad():
        assert residency.stats().spilled_bytes == 0
        model[0].weight.add_(1)
        model(torch.ones(1, 64))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_offload_ties_again_what_accelerate_parted(tmp_path):
    import accelerate

    for where in (
        {"first": "disk", "middle": "cpu", "last": "disk"},
        {"first": "cpu", "middle": "cpu", "last": "disk"},
    ):
        model = Tied().eval()
        state, expected = copied(model), model(torch.ones(1, 6))
        accelerate.dispatch_model(model, where, offload_dir=tmp_path / where["first"])
        assert torch.equal(model(torch.ones(1, 6)), expected)
        assert model.first.weight is not model.last.weight
        with lading.offload(model, DISK, replace_hooks=True):
            assert model.first.weight is model.last.weight
            assert model.middle.weight is not model.last.weight
            assert torch.equal(model(torch.ones(1, 6)), expected)
        assert_whole(model, state)


def test_offload_keeps_equal_weights_apart_that_were_not_tied(tmp_path):
    import accelerate

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].load_state_dict(model[0].state_dict())
    accelerate.dispatch_model(model, {"0": "disk", "1": "disk"}, offload_dir=tmp_path)
    with lading.offload(model, DISK, replace_hooks=True):
        assert model[0].weight is not model[1].weight
        assert model[0].weight.data_ptr() != model[1].weight.data_ptr()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_offload_takes_over_recurrent_layers(tmp_path, kind):
    import accelerate

    model = nn.Sequential(getattr(nn, kind)(4, 4))
    state, expected = copied(model), model(torch.ones(1, 2, 4))[0]
    accelerate.dispatch_model(model, {"0": "disk"}, offload_dir=tmp_path)
    with lading.offload(model, DISK, replace_hooks=True):
        assert torch.equal(model(torch.ones(1, 2, 4))[0], expected)
    assert_whole(model, state)


@pytest.mark.parametrize("net_class", [each for each in NETS if each is not ExtraState])  # which accelerate cannot hook
def test_offload_takes_over_every_unusual_net(net_class):
    import accelerate

    model = build(net_class)
    before, state, expected = attributes(model), copied(model), model(example_input())
    accelerate.cpu_offload(model)
    with lading.offload(model, {"": "cpu"}, replace_hooks=True):
        assert torch.equal(model(example_input()), expected)
    assert attributes(model) == before
    assert_whole(model, state)


def test_offload_of_weights_that_are_gone_names_them_and_changes_nothing(tmp_path):
    import accelerate

    model = accelerate.dispatch_model(net(), MIXED, offload_dir=tmp_path)
    (tmp_path / "linear1.bias.dat").unlink()
    (tmp_path / "linear2.weight.dat").write_bytes(b"short")
    before = snapshot(model)
    with pytest.raises(lading.ResidencyError) as caught:
        lading.offload(model, DISK, replace_hooks=True)
    assert "no data for 'linear1.bias', 'linear2.weight'" in str(caught.value)
    assert "linear1.bias.dat" in str(caught.value)
    assert snapshot(model) == before


def test_offload_that_fails_after_the_hooks_are_off_puts_them_back(tmp_path):
    import accelerate

    model = net()
    expected = model(X)
    accelerate.dispatch_model(model, MIXED, offload_dir=tmp_path)
    before = snapshot(model)
    with pytest.raises(lading.PlanError, match="no device for 'linear2'"):
        lading.offload(model, {"linear1": "disk", "batchnorm": "cpu"}, replace_hooks=True)
    with pytest.raises(lading.ResidencyError, match="offload_folder"):
        lading.offload(model, DISK, offload_folder=tmp_path / "no folder", replace_hooks=True)
    assert snapshot(model) == before
    assert torch.equal(model(X), expected)


def test_offload_refuses_hooks_that_do_other_things():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = net()
    add_hook_to_module(model.linear2, Doubling())
    with pytest.raises(lading.ResidencyError, match="module 'linear2': found an accelerate hook of type Doubling"):
        lading.offload(model, DISK, replace_hooks=True)


def test_offload_gives_a_forward_and_a_method_of_the_users_own_back(tmp_path):
    import accelerate

    model = net()
    model.linear1.forward = lambda x: nn.functional.linear(x, model.linear1.weight)
    model.to = model.to
    own, method = vars(model.linear1)["forward"], vars(model)["to"]
    expected = model(X)
    accelerate.dispatch_model(model, MIXED, offload_dir=tmp_path)
    with lading.offload(model, DISK, replace_hooks=True):
        assert vars(model.linear1)["forward"] is own
        assert torch.equal(model(X), expected)
    assert "to" not in vars(model) or vars(model)["to"] is method


def test_offload_takes_over_a_traced_module():
    import accelerate

    model = torch.fx.symbolic_trace(net())
    forward, expected, before = type(model).forward, model(X), attributes(model)
    accelerate.cpu_offload(model)
    with lading.offload(model, DISK, replace_hooks=True):
        assert torch.equal(model(X), expected)
    assert type(model).forward is forward
    assert attributes(model) == before


def test_offload_finds_safetensors_entries_under_another_name_and_dtype(tmp_path):
    import accelerate

    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    save_file({"stored": weight, "bias": torch.ones(64)}, tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    index = {
        "0.weight": {"safetensors_file": file, "weight_name": "stored", "dtype": "float32"},
        "0.bias": {"safetensors_file": file, "weight_name": "bias", "dtype": "float32"},
    }
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(64, 64))
    accelerate.dispatch_model(model, DISK, offload_index=index)
    expected = model(torch.ones(1, 64))
    with lading.offload(model, DISK, replace_hooks=True) as residency:
        assert residency.stats().spilled_bytes == weight.numel() * 4  # the cast one; the bias is a view
        assert torch.equal(model(torch.ones(1, 64)), expected)
        assert torch.equal(model[0].weight, weight.float())


# -- transformers


def homes(model: nn.Module) -> dict[str, str]:
    """Return a map that puts every second part of a model on disk, and everything tied: transformers asks for that."""
    counts = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    found: dict[str, str] = {}

    def visit(module: nn.Module, prefix: str, depth: int) -> None:
        for name, child in module.named_children():
            is_tied = any(counts[id(tensor)] > 1 for tensor in child.parameters())
            has_own = any(True for _ in child.parameters(recurse=False)) or not any(True for _ in child.children())
            if (is_tied or depth == 0) and not has_own:
                visit(child, f"{prefix}{name}.", depth + 1)
            else:
                found[f"{prefix}{name}"] = "disk" if is_tied else ("cpu", "disk")[len(found) % 2]

    visit(model, "", 0)
    return found


# transformers 4 needs a device for T5's second name of its table, and warns of it
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5", "t5-untied", "vit", "mixtral"])
def test_offload_takes_over_what_from_pretrained_hooked(saved: Directory, tmp_path, name, suffix):
    architecture = BY_NAME[name]
    directory, model_class = saved(architecture), architecture.resolve()
    plain = model_class.from_pretrained(directory).eval()
    if suffix == "bin":
        directory = tmp_path / "bin"
        plain.config.save_pretrained(directory)
        torch.save({key: value.clone() for key, value in plain.state_dict().items()}, directory / "pytorch_model.bin")
    model = model_class.from_pretrained(directory, device_map=homes(plain), offload_folder=tmp_path / "off").eval()
    assert [key for key, tensor in all_tensors(model) if tensor.is_meta]
    expected = architecture.run(plain)
    with lading.offload(model, {"": "disk"}, replace_hooks=True) as residency:
        assert_same(architecture.run(model), expected)
        assert_whole(model, copied(plain))
        assert residency.stats().fetches
    assert attributes(model) == attributes(plain)
    assert_same(architecture.run(model), expected)
    assert ties_of(model) == ties_of(plain)
    model.save_pretrained(tmp_path / "saved")
    assert_whole(model_class.from_pretrained(tmp_path / "saved"), copied(plain))


@pytest.mark.parametrize("name", ["resnet", "deepseek_v3"])
@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "bin"])
def test_offload_loads_the_buffers_that_transformers_left_out(tmp_path, name, is_safe):
    architecture = BY_NAME[name]
    plain = architecture.build()
    if is_safe:
        plain.save_pretrained(tmp_path)
    else:
        plain.config.save_pretrained(tmp_path)
        torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    plain = architecture.resolve().from_pretrained(tmp_path).eval()
    options = {"device_map": homes(plain), "offload_folder": tmp_path / "off"}
    model = architecture.resolve().from_pretrained(tmp_path, **options).eval()
    with lading.offload(model, {"": "disk"}, replace_hooks=True), torch.no_grad():
        assert_whole(model, copied(plain))
        assert_same(architecture.run(model), architecture.run(plain))


def assert_same(found: Any, expected: Any) -> None:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    assert [name for (name, one), (_, other) in pairs if not torch.equal(one, other)] == []


def ties_of(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_hook_that_accelerate_renames_is_refused_not_taken_for_no_hook(replaces):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = net()
    add_hook_to_module(model.linear1, AlignDevicesHook(execution_device="cpu"))
    hook = vars(model.linear1).pop("_hf_hook")
    model.linear1._hook_of_tomorrow = hook
    refused = (
        r"module 'linear1': found a AlignDevicesHook of accelerate under '_hook_of_tomorrow' · expected hooks under"
    )
    with pytest.raises(lading.ResidencyError, match=refused):
        lading.offload(model, {"": "cpu"}, replace_hooks=replaces)
