"""Fill plain modules of every kind: bit for bit what `load_state_dict` gives, complete, or left as they were."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import bits, encode
from safetensors.torch import save_file, save_model
from torch import nn

import lading
from lading.errors import CheckpointError, CorruptShardError, MissingTensorError, ShapeMismatchError
from models import (
    NETS,
    WIDTH,
    Attention,
    BareParameters,
    BatchNormed,
    Buffers,
    ExtraState,
    Float8Parameters,
    Frozen,
    FusedOnLoad,
    IntegerParameters,
    MixedDtypes,
    Plain,
    Recurrent,
    RenamedOnLoad,
    SharedModules,
    TiedParameters,
    ZerosAndOnes,
    build,
    example_input,
)

OLD_WEIGHT_NORM = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
PLAIN_NETS = [net_class for net_class in NETS if net_class is not ExtraState]
each_net = pytest.mark.parametrize("net_class", PLAIN_NETS, ids=lambda net_class: net_class.__name__)
each_build = pytest.mark.parametrize("is_real", [False, True], ids=["empty", "real"])


def stored(net: nn.Module) -> dict[str, torch.Tensor]:
    """Give a net's tensors under all their names, each with memory of its own."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if isinstance(tensor, torch.Tensor)}


def loaded(net_class: Any, seed: int = 0) -> nn.Module:
    """Give what torch's own `load_state_dict` makes of the stored tensors: its hooks have run."""
    net = net_class()
    net.load_state_dict(build(net_class, seed).state_dict())
    return net.eval()


def save_to(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def blank(net_class: Any, *, is_real: bool = False) -> nn.Module:
    if is_real:
        return net_class()
    with lading.empty():
        return net_class()


def assert_same(net: nn.Module, reference: nn.Module) -> None:
    """Check tensors, their bits, dtypes, gradients wanted, ties and the outputs of two nets."""
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(net, kind)(remove_duplicate=False))
        theirs = dict(getattr(reference, kind)(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert bits(tensor) == bits(theirs[name]), name
            assert tensor.requires_grad == theirs[name].requires_grad, name
            assert type(tensor) is type(theirs[name]), name
        for name, tensor in ours.items():
            assert {other for other in ours if ours[other] is tensor} == {o for o in ours if theirs[o] is theirs[name]}
    net.eval()
    assert bits(net(example_input())) == bits(reference(example_input()))


def snapshot(net: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Describe every place of a net: which object, with which bits, at which address; and every list."""
    seen: dict[str, tuple[Any, ...]] = {}
    for prefix, module in net.named_modules(remove_duplicate=False):
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in held.items():
                data = None if tensor is None or tensor.is_meta else (tensor.data_ptr(), bits(tensor), tensor.dtype)
                seen[f"{prefix}.{name} {kind}"] = (id(tensor), data, getattr(tensor, "requires_grad", None))
        for name, value in vars(module).items():
            if isinstance(value, list):
                seen[f"{prefix}.{name} list"] = tuple(id(item) for item in value)
    return seen


# Every kind of module ------------------------------------------------------------------------------------------------


@each_net
@each_build
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_load_into_each_net_gives_what_was_saved(tmp_path, net_class, is_real, suffix):
    reference = loaded(net_class)
    path = save_to(tmp_path / f"net{suffix}", stored(reference))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    net = blank(net_class, is_real=is_real)
    report = lading.load_into(net, path)
    assert_same(net, reference)
    assert (report.missing, report.unexpected, report.loader) == ((), (), "lading")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


@each_net
def test_load_into_each_empty_net_from_a_file_without_its_ties(tmp_path, net_class):
    reference = loaded(net_class)
    save_model(reference, tmp_path / "net.safetensors")  # leaves tied names out and notes them in the metadata
    net = blank(net_class)
    lading.load_into(net, tmp_path / "net.safetensors")
    assert_same(net, reference)


@each_net
def test_load_into_each_net_with_copy_gives_the_same(tmp_path, net_class):
    path = save_to(tmp_path / "net.safetensors", stored(build(net_class)))
    net = blank(net_class)
    report = lading.load_into(net, path, copy=True)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(net, loaded(net_class))
    assert report.mapped_bytes == 0


@each_net
def test_load_into_each_real_net_keeps_the_identity_of_its_parameters(tmp_path, net_class):
    path = save_to(tmp_path / "net.safetensors", stored(build(net_class)))
    net = blank(net_class, is_real=True)
    before = {name: id(parameter) for name, parameter in net.named_parameters(remove_duplicate=False)}
    lading.load_into(net, path)
    assert {name: id(parameter) for name, parameter in net.named_parameters(remove_duplicate=False)} == before


@each_net
def test_load_into_each_net_trains_as_the_original_and_leaves_the_file(tmp_path, net_class):
    reference = loaded(net_class)
    if not any(parameter.requires_grad for parameter in reference.parameters()):
        return
    path = save_to(tmp_path / "net.safetensors", stored(reference))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    net = blank(net_class)
    lading.load_into(net, path)
    for one in (net, reference):
        one.train()
        optimizer = torch.optim.SGD([parameter for parameter in one.parameters() if parameter.requires_grad], lr=0.1)
        one(example_input()).float().square().sum().backward()
        optimizer.step()
        one.eval()
    assert_same(net, reference)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


@each_net
@each_build
def test_load_into_that_fails_leaves_each_net_as_it_was(tmp_path, net_class, is_real):
    path = save_to(tmp_path / "net.safetensors", {**stored(build(net_class, seed=3)), "no.such.name": torch.ones(1)})
    net = blank(net_class, is_real=is_real)
    before = snapshot(net)
    with pytest.raises(CheckpointError, match=r"no.such.name"):
        lading.load_into(net, path, strict="exact")
    assert snapshot(net) == before


@each_net
@each_build
def test_load_into_with_a_name_missing_leaves_each_net_as_it_was(tmp_path, net_class, is_real):
    state = stored(build(net_class, seed=3))
    removed = sorted(state)[-1]
    values = state.pop(removed)
    state = {name: tensor for name, tensor in state.items() if not same(tensor, values)}  # under all its names
    if net_class in (RenamedOnLoad, FusedOnLoad):
        state["left.over"] = torch.ones(1)  # so that there is a file
    path = save_to(tmp_path / "net.safetensors", state)
    net = blank(net_class, is_real=is_real)
    before = snapshot(net)
    with pytest.raises(CheckpointError):
        lading.load_into(net, path)
    assert snapshot(net) == before


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and bits(first) == bits(second)


@each_net
def test_load_into_without_strict_of_nothing_initialises_each_net_as_its_class_does(tmp_path, net_class):
    path = save_to(tmp_path / "net.safetensors", {"left.over": torch.ones(1)})
    torch.manual_seed(5)
    reference = net_class().eval()
    reference.load_state_dict({}, strict=False)  # runs its hooks
    net = blank(net_class)
    torch.manual_seed(5)
    report = lading.load_into(net, path, strict=False)
    assert set(report.missing) <= set(reference.state_dict())
    assert report.unexpected == ("left.over",)
    assert report.num_tensors == 0
    assert_same(net, reference)


@each_net
def test_load_into_twice_takes_the_second_checkpoint(tmp_path, net_class):
    net = blank(net_class)
    for seed in (1, 2):
        lading.load_into(net, save_to(tmp_path / f"{seed}.safetensors", stored(build(net_class, seed=seed))))
    assert_same(net, loaded(net_class, seed=2))


# Rename --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "rename"),
    [
        ("model.", {"model": ""}),
        ("model.", {"model.": ""}),
        ("model.", lambda name: name.removeprefix("model.")),
        ("a.b.", {"a": "zzz", "a.b": ""}),
        ("", lambda name: name),
        ("", {}),
        ("", {"unused": "names"}),
    ],
)
def test_load_into_with_rename_binds_under_the_new_names(tmp_path, prefix, rename):
    state = {f"{prefix}{name}": tensor for name, tensor in stored(build(Plain)).items()}
    net = blank(Plain)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state), rename=rename)
    assert_same(net, build(Plain))


def test_load_into_with_rename_adds_a_prefix_to_every_name(tmp_path):
    net = blank(lambda: nn.ModuleDict({"inner": Plain()}))
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(Plain))), rename={"": "inner"})
    assert_same(net["inner"], build(Plain))


def test_load_into_with_rename_of_whole_names_and_of_none_leaves_out(tmp_path):
    state = {**stored(build(Plain)), "optimizer.step": torch.ones(1)}
    state["norm.gamma"] = state.pop("norm.weight")
    path = save_to(tmp_path / "net.safetensors", state)
    net = blank(Plain)
    report = lading.load_into(
        net, path, rename=lambda name: None if name.startswith("optimizer") else name.replace("gamma", "weight")
    )
    assert_same(net, build(Plain))
    assert report.unexpected == ()
    assert report.num_tensors == len(state) - 1
    with pytest.raises(CheckpointError, match=r"optimizer.step"):
        lading.load_into(blank(Plain), path, rename={"norm.gamma": "norm.weight"}, strict="exact")


def test_load_into_with_rename_of_two_names_to_one_refuses(tmp_path):
    path = save_to(tmp_path / "net.safetensors", {**stored(build(Plain)), "old.weight": torch.ones(16)})
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            lading.load_into(blank(Plain), path, rename={"old": "norm"}, strict=strict)
        assert "found 'norm.weight' and 'old.weight' both renamed to 'norm.weight'" in str(caught.value)
        assert "expected one tensor for each name · let rename give None for the one to leave out" in str(caught.value)


def test_load_into_with_metadata_that_looks_like_a_tie_takes_it_for_none(tmp_path):
    """The usual `{"format": "pt"}`, and a tensor that happens to be called `pt`."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pt = nn.Parameter(torch.zeros(3))

    save_file({"pt": torch.arange(3.0)}, tmp_path / "net.safetensors", metadata={"format": "pt"})
    net = blank(Net)
    report = lading.load_into(net, tmp_path / "net.safetensors")
    assert net.pt.tolist() == [0, 1, 2]
    assert report.unexpected == ()


# Shapes, dtypes, names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_load_into_of_wrong_shapes_lists_them_all_with_found_and_expected(tmp_path, strict):
    state = stored(build(Plain))
    state["up.weight"] = state["up.weight"].T.contiguous()
    state["norm.bias"] = torch.ones(4)
    path = save_to(tmp_path / "net.safetensors", state)
    net = blank(Plain)
    before = snapshot(net)
    with pytest.raises(ShapeMismatchError) as caught:
        lading.load_into(net, path, strict=strict)
    message = str(caught.value)
    assert f"{path}, tensor 'up.weight': found shape [8, 16] · expected shape [16, 8] · it is transposed" in message
    assert f"{path}, tensor 'norm.bias': found shape [4] · expected shape [16] · use the checkpoint's own" in message
    assert snapshot(net) == before


def test_load_into_of_a_scalar_for_a_vector_refuses_instead_of_reshaping(tmp_path):
    for shape in ((), (1, 16), (16, 1), (0,)):
        state = {**stored(build(Plain)), "norm.bias": torch.ones(shape)}
        with pytest.raises(ShapeMismatchError, match=r"norm.bias"):
            lading.load_into(blank(Plain), save_to(tmp_path / "net.safetensors", state))


def test_load_into_of_a_tensor_larger_than_its_file_is_refused_before_anything_is_cast(tmp_path):
    """A file of one number may claim 2**42 of them, all the same: a cast would write them out."""
    state = stored(build(Plain))
    state["norm.bias"] = torch.ones(1).expand(1 << 42)
    path = save_to(tmp_path / "net.bin", state)
    for dtype in ("auto", None, torch.bfloat16):
        with pytest.raises(CorruptShardError, match=r"norm\.bias.*found shape \[4398046511104\] on 4 bytes"):
            lading.load_into(blank(Plain), path, dtype=dtype)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "found", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]
)
def test_load_into_of_other_element_types_for_floats_refuses(tmp_path, found, strict):
    state = {**stored(build(Plain)), "norm.bias": torch.ones(16).to(found)}
    path = save_to(tmp_path / "net.safetensors", state)
    for dtype in ("auto", None, torch.bfloat16):
        with pytest.raises(CheckpointError) as caught:
            lading.load_into(blank(Plain), path, strict=strict, dtype=dtype)
        assert f"{path}, tensor 'norm.bias': found {str(found)[6:]} data · expected float32 · load a" in str(
            caught.value
        )


@pytest.mark.parametrize(
    ("net_class", "name", "value"),
    [
        (IntegerParameters, "weight", torch.ones(WIDTH, WIDTH)),
        (IntegerParameters, "weight", torch.ones(WIDTH, WIDTH, dtype=torch.uint8)),
        (IntegerParameters, "packed", torch.ones(WIDTH, WIDTH // 2, dtype=torch.int8)),
        (Float8Parameters, "weight", torch.ones(WIDTH, WIDTH)),
        (Float8Parameters, "weight", torch.ones(WIDTH, WIDTH).to(torch.float8_e5m2)),
        (BatchNormed, "norm.num_batches_tracked", torch.tensor(3.0)),
        (Buffers, "order", torch.ones(WIDTH)),
        (Buffers, "mask", torch.ones(WIDTH, dtype=torch.uint8)),
        (MixedDtypes, "phase", torch.ones(WIDTH)),
    ],
)
def test_load_into_of_floats_or_other_integers_for_exact_types_refuses(tmp_path, net_class, name, value):
    path = save_to(tmp_path / "net.safetensors", {**stored(build(net_class)), name: value})
    for is_real in (False, True):
        with pytest.raises(CheckpointError, match=f"tensor '{name}': found {str(value.dtype)[6:]} data · expected"):
            lading.load_into(blank(net_class, is_real=is_real), path, strict=False)


@each_build
@pytest.mark.parametrize(
    ("asked", "stored_as", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float64, torch.float64),
        (None, torch.bfloat16, torch.float32),
        (None, torch.float64, torch.float32),
        (None, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("torch.float16", torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_load_into_with_a_dtype_casts_floats_as_asked(tmp_path, is_real, asked, stored_as, expected):
    state = {name: tensor.to(stored_as) for name, tensor in stored(build(Plain)).items()}
    net = blank(Plain, is_real=is_real)
    report = lading.load_into(net, save_to(tmp_path / "net.safetensors", state), dtype=asked)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == expected
        assert bits(parameter) == bits(state[name].to(expected))
    total = sum(parameter.nbytes for parameter in net.parameters())
    assert (report.copied_bytes == 0) is (stored_as == expected)
    assert report.copied_bytes + report.mapped_bytes == total


@pytest.mark.parametrize(
    "net_class", [IntegerParameters, Float8Parameters, Buffers, BatchNormed], ids=lambda cls: cls.__name__
)
def test_load_into_with_a_dtype_leaves_integers_and_small_floats_alone(tmp_path, net_class):
    reference = build(net_class)
    net = blank(net_class)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(reference)), dtype=torch.bfloat16)
    for name, tensor in net.state_dict().items():
        original = reference.state_dict()[name]
        is_plain = original.dtype == torch.float32
        assert tensor.dtype == (torch.bfloat16 if is_plain else original.dtype), name
        assert bits(tensor) == bits(original.to(tensor.dtype)), name


def test_load_into_with_a_dtype_casts_a_tied_tensor_once(tmp_path):
    net = blank(TiedParameters)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(TiedParameters))), dtype=torch.bfloat16)
    assert net.head.weight is net.embedding.weight
    assert net.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["flaot16", "Linear", "torch.nn"])
def test_load_into_with_a_dtype_that_torch_lacks_says_so(tmp_path, dtype):
    path = save_to(tmp_path / "net.safetensors", stored(build(Plain)))
    with pytest.raises(TypeError, match=f"dtype: found '{dtype}' · expected 'auto', a torch.dtype or its name"):
        lading.load_into(blank(Plain), path, dtype=dtype)


def test_load_into_of_packed_four_bit_tensors(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            empty = torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
            self.weight = nn.Parameter(empty, requires_grad=False)

    raw = encode({"weight": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}}, bytes(range(12)))
    (tmp_path / "net.safetensors").write_bytes(raw)
    net = Net()
    lading.load_into(net, tmp_path / "net.safetensors")
    assert net.weight.view(torch.uint8).reshape(-1).tolist() == list(range(12))
    assert net.weight.dtype == torch.float4_e2m1fn_x2


def test_load_into_of_missing_names_lists_ten_and_the_total(tmp_path):
    path = save_to(tmp_path / "net.safetensors", {"0.weight": torch.ones(2, 2)})
    net = blank(lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)]))
    with pytest.raises(MissingTensorError) as caught:
        lading.load_into(net, path)
    message = str(caught.value)
    assert "'net.safetensors': found no tensor for '0.bias', '1.weight', " in message
    assert "… (15 in all) · expected every parameter and persistent buffer of Sequential" in message
    assert "rename the checkpoint's names, or initialise what is missing with strict=False" in message
    assert isinstance(caught.value, KeyError)
    assert not message.startswith('"'), "a KeyError's repr"


def test_load_into_exactly_of_unexpected_names_proposes_the_nearest(tmp_path):
    path = save_to(tmp_path / "net.safetensors", {**stored(build(Plain)), "norm.weights": torch.ones(16)})
    with pytest.raises(CheckpointError) as caught:
        lading.load_into(blank(Plain), path, strict="exact")
    message = str(caught.value)
    assert (
        f"{path}: found names that the model has no place for: 'norm.weights' · expected names of Plain, such as"
        in message
    )
    assert "'norm.weight'" in message
    assert 'rename them, or leave them out without strict="exact"' in message


# Without strict ------------------------------------------------------------------------------------------------------


@each_build
def test_load_into_without_strict_binds_what_there_is_and_tells_the_rest(tmp_path, is_real, caplog):
    state = stored(build(Plain))
    del state["up.bias"]
    state["extra.weight"] = torch.ones(1)
    path = save_to(tmp_path / "net.safetensors", state)
    net = blank(Plain, is_real=is_real)
    kept = None if not is_real else net.up.bias.detach().clone()
    with caplog.at_level("WARNING", logger="lading"):
        report = lading.load_into(net, path, strict=False)
    assert report.missing == ("up.bias",)
    assert report.unexpected == ("extra.weight",)
    assert report.num_tensors == len(state) - 1
    assert "'up.bias'" in caplog.text
    assert "'extra.weight'" in caplog.text
    assert bits(net.up.weight) == bits(state["up.weight"])
    assert not net.up.bias.is_meta
    assert net.up.bias.requires_grad
    if is_real:
        assert torch.equal(net.up.bias, kept)


def test_load_into_without_strict_initialises_a_tied_pair_as_one(tmp_path):
    state = stored(build(TiedParameters))
    del state["head.weight"], state["embedding.weight"]
    net = blank(TiedParameters)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state), strict=False)
    assert net.head.weight is net.embedding.weight
    assert not net.head.weight.is_meta


def test_load_into_without_strict_casts_what_it_initialises(tmp_path):
    state = stored(build(Plain))
    del state["up.bias"]
    net = blank(Plain)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state), strict=False, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}


def test_load_into_without_strict_of_a_module_on_meta_by_other_means_names_what_cannot_be_made(tmp_path):
    state = stored(build(Plain))
    del state["up.bias"]
    with torch.device("meta"):
        net = Plain()
    before = snapshot(net)
    with pytest.raises(
        MissingTensorError, match=r"'up\.bias' and no record of how the module initialises them"
    ) as caught:
        lading.load_into(net, save_to(tmp_path / "net.safetensors", state), strict=False)
    assert "build the module inside `with lading.empty():`" in str(caught.value)
    assert snapshot(net) == before


def test_load_into_of_a_meta_module_with_a_non_persistent_buffer_refuses_it(tmp_path):
    with torch.device("meta"):
        net = Buffers()
    with pytest.raises(MissingTensorError, match=r"'inverse_frequencies'.* still on meta after loading"):
        lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(Buffers))))


@each_build
def test_load_into_of_extra_state_says_what_safetensors_cannot_hold(tmp_path, is_real):
    reference = build(ExtraState)
    path = save_to(tmp_path / "net.safetensors", stored(reference))
    with pytest.raises(MissingTensorError, match="_extra_state"):
        lading.load_into(blank(ExtraState, is_real=is_real), path)
    net = blank(ExtraState, is_real=is_real)
    report = lading.load_into(net, path, strict=False)
    assert report.missing == ("_extra_state",)
    assert_same(net, reference)


def test_load_into_without_strict_initialises_layers_made_by_deepcopy(tmp_path):
    net = blank(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    path = save_to(tmp_path / "net.safetensors", {"layers.0.norm1.weight": torch.ones(8)})
    report = lading.load_into(net, path, strict=False)
    assert "layers.1.linear1.weight" in report.missing
    assert not any(parameter.is_meta for parameter in net.parameters())


# Ties ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["head.weight", "embedding.weight"])
@each_build
def test_load_into_of_a_tied_tensor_stored_under_either_name(tmp_path, kept, is_real):
    state = stored(build(TiedParameters))
    del state["head.weight" if kept == "embedding.weight" else "embedding.weight"]
    del state["gain"]
    net = blank(TiedParameters, is_real=is_real)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state))
    assert_same(net, build(TiedParameters))


@pytest.mark.parametrize("strict", [True, False])
def test_load_into_of_tied_names_with_different_values_refuses(tmp_path, strict):
    state = stored(build(TiedParameters))
    state["head.weight"][0, 0] += 1
    path = save_to(tmp_path / "net.safetensors", state)
    with pytest.raises(CheckpointError) as caught:
        lading.load_into(blank(TiedParameters), path, strict=strict)
    message = str(caught.value)
    assert f"{path}, tensors " in message
    assert "'embedding.weight'" in message
    assert "'head.weight'" in message
    assert "found different values · expected one value, because the module ties them" in message


def test_load_into_of_an_alias_into_a_module_that_does_not_tie_gives_both_the_values(tmp_path):
    save_model(build(TiedParameters), tmp_path / "net.safetensors")

    class Untied(TiedParameters):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = nn.Parameter(torch.zeros(16, WIDTH))

    net = blank(Untied)
    lading.load_into(net, tmp_path / "net.safetensors")
    assert net.head.weight is not net.embedding.weight
    assert torch.equal(net.head.weight, net.embedding.weight)


def test_load_into_of_shared_modules_stored_once(tmp_path):
    state = {name: tensor for name, tensor in stored(build(SharedModules)).items() if not name.startswith("second")}
    net = blank(SharedModules)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state))
    assert net.second is net.first
    assert_same(net, build(SharedModules))


# Modules that load themselves ----------------------------------------------------------------------------------------


@each_build
@pytest.mark.parametrize("net_class", [FusedOnLoad, RenamedOnLoad], ids=lambda cls: cls.__name__)
def test_load_into_of_an_old_format_goes_through_the_modules_own_loading(tmp_path, net_class, is_real):
    reference = build(net_class)
    path = save_to(
        tmp_path / "net.safetensors", {name: part.clone() for name, part in reference.old_state_dict().items()}
    )
    net = blank(net_class, is_real=is_real)
    report = lading.load_into(net, path)
    assert_same(net, reference)
    assert report.missing == ()
    nested = blank(lambda: nn.ModuleDict({"inner": net_class()}), is_real=is_real)
    lading.load_into(nested, path, rename={"": "inner"})
    assert_same(nested["inner"], reference)


def test_load_into_whose_own_loading_reports_an_error_passes_it_on(tmp_path):
    class Picky(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            rest[-1].append("weights of another release")

    path = save_to(tmp_path / "net.safetensors", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    net = blank(lambda: Picky(2, 2), is_real=True)
    before = snapshot(net)
    with pytest.raises(CheckpointError) as caught:
        lading.load_into(net, path)
    assert "'net.safetensors', module '(root)' (Picky): found weights of another release" in str(caught.value)
    assert snapshot(net) == before


def test_load_into_whose_hook_raises_leaves_the_module_as_it_was(tmp_path):
    net = blank(Plain, is_real=True)

    def hook(module: nn.Module, incompatible: object) -> None:
        raise RuntimeError("mine")

    net.down.register_load_state_dict_post_hook(hook)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="mine"):
        lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(Plain))))
    assert snapshot(net) == before


def test_load_into_calls_pre_and_post_hooks_in_torchs_order(tmp_path):
    calls: list[str] = []

    def build_with_hooks() -> nn.Module:
        net = nn.Sequential(nn.Linear(2, 2))
        net.register_load_state_dict_pre_hook(lambda *_: calls.append("pre root"))
        net[0].register_load_state_dict_pre_hook(lambda *_: calls.append("pre leaf"))
        net.register_load_state_dict_post_hook(lambda *_: calls.append("post root"))
        net[0].register_load_state_dict_post_hook(lambda *_: calls.append("post leaf"))
        return net

    state = stored(nn.Sequential(nn.Linear(2, 2)))
    build_with_hooks().load_state_dict(state)
    expected, calls[:] = calls[:], []
    lading.load_into(blank(build_with_hooks), save_to(tmp_path / "net.safetensors", state))
    assert calls == expected


@each_build
def test_load_into_of_batch_norm_without_its_counter_does_as_torch_does(tmp_path, is_real):
    state = stored(build(BatchNormed))
    del state["norm.num_batches_tracked"]
    net = blank(BatchNormed, is_real=is_real)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", state), strict=False)
    assert int(net.norm.num_batches_tracked) == 0
    assert bits(net.norm.running_mean) == bits(state["norm.running_mean"])


@each_build
def test_load_into_of_an_lstm_sets_the_list_it_computes_with(tmp_path, is_real):
    net = blank(Recurrent, is_real=is_real)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(Recurrent))))
    for name, weight in zip(net.lstm._flat_weights_names, net.lstm._flat_weights, strict=True):
        assert weight is getattr(net.lstm, name)
    assert_same(net, build(Recurrent))
    copied = copy.deepcopy(net)
    assert torch.equal(copied(example_input()), net(example_input()))


def test_load_into_of_attention_runs_its_fast_path_alike(tmp_path):
    net = blank(Attention)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(Attention))))
    with torch.inference_mode():
        assert bits(net.eval()(example_input())) == bits(build(Attention)(example_input()))


@OLD_WEIGHT_NORM
@each_build
def test_load_into_of_the_old_weight_norm_computes_the_weight_anew(tmp_path, is_real):
    torch.manual_seed(0)
    reference = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    path = save_to(tmp_path / "net.safetensors", stored(reference))
    net = blank(lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)), is_real=is_real)
    lading.load_into(net, path)
    assert torch.equal(net(example_input()), reference(example_input()))


@each_build
def test_load_into_of_a_lazy_module_gives_it_its_shape(tmp_path, is_real):
    reference = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4)).eval()
    reference[1].running_mean.fill_(0.5)
    path = save_to(tmp_path / "net.safetensors", stored(reference))
    net = blank(lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), is_real=is_real).eval()
    lading.load_into(net, path)
    assert net[0].weight.shape == (4, WIDTH)
    assert torch.equal(net(example_input()), reference(example_input()))


def test_load_into_of_a_parameter_subclass_on_meta_refuses_to_guess(tmp_path):
    class Special(nn.Parameter):
        pass

    with torch.device("meta"):
        net = nn.Linear(2, 2)
        net.weight = Special(torch.empty(2, 2))
    path = save_to(tmp_path / "net.safetensors", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match="tensor 'weight': found a parameter of type Special in the module"):
        lading.load_into(net, path)


# Copies, views, attributes -------------------------------------------------------------------------------------------


def test_load_into_views_the_file_and_reports_it(tmp_path):
    state = stored(build(Plain))
    path = save_to(tmp_path / "net.safetensors", state)
    for is_real in (False, True):
        net = blank(Plain, is_real=is_real)
        report = lading.load_into(net, path)
        total = sum(tensor.nbytes for tensor in state.values())
        assert (report.mapped_bytes, report.copied_bytes, report.num_tensors) == (total, 0, len(state))
    report = lading.load_into(blank(Plain), path, copy=True)
    assert (report.mapped_bytes, report.copied_bytes) == (0, total)


def test_load_into_keeps_attributes_and_requires_grad_of_parameters(tmp_path):
    def make() -> nn.Module:
        net = Frozen()
        net.head.weight.note = "mine"
        return net

    path = save_to(tmp_path / "net.safetensors", stored(build(Frozen)))
    for is_real in (False, True):
        net = blank(make, is_real=is_real)
        lading.load_into(net, path)
        assert vars(net.head.weight) == {"note": "mine"}
        assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
        assert all(parameter.is_leaf for parameter in net.parameters())


def test_load_into_of_a_real_module_serves_an_optimizer_made_before(tmp_path):
    net = blank(BareParameters, is_real=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    lading.load_into(net, save_to(tmp_path / "net.safetensors", stored(build(BareParameters))))
    net(example_input()).sum().backward()
    optimizer.step()
    assert not torch.equal(net.inner.scale, build(BareParameters).inner.scale)


def test_load_into_leaves_training_mode_and_other_attributes_alone(tmp_path):
    path = save_to(tmp_path / "net.safetensors", stored(build(ZerosAndOnes)))
    for training in (True, False):
        net = blank(ZerosAndOnes).train(training)
        lading.load_into(net, path)
        assert net.training is training
        assert not net._forward_pre_hooks


def test_load_into_with_readahead_gives_the_same(tmp_path):
    path = save_to(tmp_path / "net.safetensors", stored(build(Plain)))
    net = blank(Plain)
    report = lading.load_into(net, path, readahead=True)
    assert report.copied_bytes == 0
    assert_same(net, build(Plain))
