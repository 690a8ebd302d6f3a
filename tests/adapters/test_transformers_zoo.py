"""Prove that `lading.load` gives what `from_pretrained` gives, bit for bit, on every architecture of the zoo.

The reference is always `from_pretrained` on the same directory, and it must have found every tensor: a reference that
initialises at random proves nothing. By default every architecture is loaded, compared and run once; casts, shards,
`.bin` files and a training step run on a sample of all families, and on the whole zoo under the marker `full`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from architectures import ARCHITECTURES, AVAILABLE, FAMILIES, MAJOR, Architecture
from zoo import BY_NAME, EVERY, QUIET, SAMPLE, Directory, named_tensors, tensors, ties

pytestmark = QUIET


def reference(model_class: type, directory: Path, *, dtype: str | torch.dtype = "auto") -> transformers.PreTrainedModel:
    """Return `from_pretrained`'s model; every tensor must have come from the file."""
    transformers.set_seed(1)
    model, info = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    lost = {kind: names for kind, names in info.items() if names and kind != "unexpected_keys"}
    assert not lost, f"the reference itself is incomplete: {lost}"
    return model


def bits(tensor: torch.Tensor) -> bytes:
    """Return the tensor's elements as bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digests(directory: Path) -> dict[str, str]:
    """Return a hash of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def kind(module: nn.Module) -> str:
    """Return the class's full name: each parametrised module has a class object of its own."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def plain_values(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes that are numbers, strings and the like."""
    return {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, type(None)))}


def tensor_differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> Iterator[str]:
    """Yield a line for every tensor whose name, dtype, shape, device or bits differ."""
    for name in sorted(expected.keys() ^ found.keys()):
        yield f"{name}: only in {'the reference' if name in expected else 'ours'}"
    for name in expected.keys() & found.keys():
        ours, theirs = found[name], expected[name]
        if type(ours) is not type(theirs):
            yield f"{name}: is a {type(ours).__name__}, expected a {type(theirs).__name__}"
        for what in ("dtype", "shape", "device", "requires_grad"):
            if getattr(ours, what) != getattr(theirs, what):
                yield f"{name}: {what} is {getattr(ours, what)}, expected {getattr(theirs, what)}"
        if ours.device.type != "meta" and ours.dtype == theirs.dtype and bits(ours) != bits(theirs):
            yield f"{name}: other bits than the reference"


def module_differences(expected: nn.Module, found: nn.Module) -> Iterator[str]:
    """Yield a line for every module whose type, mode or attributes differ."""
    theirs, ours = (dict(model.named_modules(remove_duplicate=False)) for model in (expected, found))
    for name in sorted(theirs.keys() ^ ours.keys()):
        yield f"module {name!r}: only in {'the reference' if name in theirs else 'ours'}"
    for name in theirs.keys() & ours.keys():
        one, other = theirs[name], ours[name]
        if kind(one) != kind(other):
            yield f"module {name!r}: is a {kind(other)}, expected {kind(one)}"
        if vars(one).keys() != vars(other).keys():
            missing, added = vars(one).keys() - vars(other).keys(), vars(other).keys() - vars(one).keys()
            yield f"module {name!r}: attributes missing {sorted(missing)}, added {sorted(added)}"
        if plain_values(one) != plain_values(other):
            yield f"module {name!r}: {sorted(plain_values(other).items() ^ plain_values(one).items(), key=str)}"
        if one._non_persistent_buffers_set != other._non_persistent_buffers_set:
            ours_only = other._non_persistent_buffers_set - one._non_persistent_buffers_set
            yield f"module {name!r}: other non-persistent buffers, ours alone has {sorted(ours_only)}"


def model_differences(expected: transformers.PreTrainedModel, found: transformers.PreTrainedModel) -> list[str]:
    """Return a line for everything in which two models differ before they ran; an empty list for equal ones."""
    differences = [
        *tensor_differences(named_tensors(expected), named_tensors(found)),
        *module_differences(expected, found),
    ]
    if list(expected.state_dict()) != list(found.state_dict()):
        differences.append("state_dict: other names or another order")
    for how, key in (("storage", torch.Tensor.data_ptr), ("identity", id)):
        if ties(expected, key) != ties(found, key):
            differences.append(f"ties by {how}: {ties(found, key)}, expected {ties(expected, key)}")
    for what in ("config", "generation_config"):
        ours, theirs = (getattr(model, what, None) for model in (found, expected))
        if (ours and ours.to_dict()) != (theirs and theirs.to_dict()) or type(ours) is not type(theirs):
            differences.append(f"{what}: {ours}, expected {theirs}")
    return differences


def assert_equal(differences: Iterable[str], overwritten: tuple[str, ...] = ()) -> None:
    """Fail with the differences, but for tensors that `from_pretrained` itself overwrites: there the file is right."""
    lines = [line for line in differences if line.split(":")[0] not in overwritten]
    assert not lines, f"{len(lines)} differences\n" + "\n".join(lines[:20])


def output_differences(expected: Any, found: Any) -> list[str]:
    """Return a line for every output tensor that differs."""
    theirs, ours = dict(tensors(expected)), dict(tensors(found))
    assert theirs, "the reference gave no tensor"
    return list(tensor_differences(theirs, ours))


def run(architecture: Architecture, model: nn.Module) -> Any:
    """Return the outputs without autograd."""
    with torch.no_grad():
        return architecture.run(model)


# -- the zoo itself


def test_zoo_has_fifty_architectures_of_every_family_in_this_version():
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES)
    assert len({architecture.model_class for architecture in AVAILABLE}) >= 50
    assert {architecture.family for architecture in AVAILABLE} == set(FAMILIES)
    assert {architecture.family for architecture in SAMPLE} == set(FAMILIES)


@pytest.mark.parametrize("architecture", EVERY)
def test_zoo_entry_is_small_seeded_and_finite(architecture: Architecture):
    model, twin = architecture.build(), architecture.build()
    assert_equal(tensor_differences(named_tensors(model), named_tensors(twin)))
    assert sum(parameter.nbytes for parameter in model.parameters()) < 800_000
    outputs = [tensor for _, tensor in tensors(run(architecture, model)) if tensor.is_floating_point()]
    assert all(not tensor.isnan().any() for tensor in outputs)
    assert any(tensor.isfinite().all() and tensor.count_nonzero() for tensor in outputs)


# -- loading


@pytest.mark.parametrize("architecture", [pytest.param(each, id=each.name) for each in AVAILABLE])
def test_load_any_architecture_equals_from_pretrained(architecture: Architecture, saved: Directory):
    directory = saved(architecture)
    before = digests(directory)
    expected = reference(architecture.resolve(), directory)
    found = lading.load(directory)
    assert_equal(model_differences(expected, found), architecture.overwritten)
    assert_equal(output_differences(run(architecture, expected), run(architecture, found)))
    assert digests(directory) == before


@pytest.mark.parametrize("architecture", EVERY)
def test_load_any_architecture_equals_the_model_that_was_saved(architecture: Architecture, saved: Directory):
    expected, found = architecture.build(), lading.load(saved(architecture))
    differences = list(tensor_differences(expected.state_dict(), found.state_dict()))
    assert_equal(differences, architecture.overwritten)


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_load_in_another_dtype_equals_from_pretrained(architecture: Architecture, dtype: torch.dtype, saved: Directory):
    directory = saved(architecture)
    expected = reference(architecture.resolve(), directory, dtype=dtype)
    found = lading.load(directory, dtype=dtype)
    assert_equal(model_differences(expected, found), architecture.overwritten)


@pytest.mark.parametrize("architecture", EVERY)
def test_load_sharded_equals_from_pretrained(architecture: Architecture, tmp_path: Path):
    architecture.build().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = lading.load(tmp_path)
    expected = reference(architecture.resolve(), tmp_path)
    assert_equal(model_differences(expected, found), architecture.overwritten)
    assert_equal(output_differences(run(architecture, expected), run(architecture, found)))


@pytest.mark.parametrize("architecture", EVERY)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_load_bin_files_equals_from_pretrained(architecture: Architecture, num_shards: int, tmp_path: Path):
    write_bin(architecture.build(), tmp_path, num_shards)
    expected = reference(architecture.resolve(), tmp_path)
    found = lading.load(tmp_path)
    assert_equal(model_differences(expected, found), architecture.overwritten)
    assert_equal(output_differences(run(architecture, expected), run(architecture, found)))


def write_bin(model: transformers.PreTrainedModel, directory: Path, num_shards: int) -> None:
    """Save as before safetensors: `pytorch_model.bin`, or shards with an index; tied names stand in full."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    state = model.state_dict()
    if num_shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for index in range(num_shards):
        name = f"pytorch_model-{index + 1:05}-of-{num_shards:05}.bin"
        part = dict(list(state.items())[index::num_shards])
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -- training


@pytest.mark.parametrize("architecture", [each for each in EVERY if each.values[0].trains])
@pytest.mark.parametrize("optimiser_class", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_one_training_step_equals_from_pretrained(
    architecture: Architecture, optimiser_class: type[torch.optim.Optimizer], saved: Directory
):
    directory = saved(architecture)
    before = digests(directory)
    expected = reference(architecture.resolve(), directory)
    found = lading.load(directory)
    if architecture.overwritten:
        found.load_state_dict(expected.state_dict())
    start = copy.deepcopy(expected.state_dict())
    train_one_step(architecture, expected, optimiser_class)
    train_one_step(architecture, found, optimiser_class)
    assert_equal(tensor_differences(named_tensors(expected), named_tensors(found)))
    assert any(bits(tensor) != bits(start[name]) for name, tensor in expected.state_dict().items())
    assert digests(directory) == before


def train_one_step(architecture: Architecture, model: nn.Module, optimiser_class: type[torch.optim.Optimizer]) -> None:
    """Take one step down the mean square of all outputs that carry gradients, dropout included."""
    model.train()
    outputs = [
        tensor for _, tensor in tensors(architecture.run(model)) if tensor.requires_grad and tensor.is_floating_point()
    ]
    loss = sum(tensor[tensor.isfinite()].square().mean() for tensor in outputs)
    loss.backward()
    optimiser_class(model.parameters(), lr=0.01).step()


# -- checkpoints of other ages


def rewrite(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """Copy a checkpoint with its tensors renamed."""
    target.mkdir()
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    stored = load_file(source / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})


def to_gamma_and_beta(name: str) -> str:
    """Return the name that TensorFlow gave a LayerNorm's tensors, and the first BERT checkpoints kept."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def to_weight_norm(name: str) -> str:
    """Return the name from before weight norm was a parametrisation."""
    old = {"original0": "weight_g", "original1": "weight_v"}
    return re.sub(r"parametrizations\.weight\.(original[01])", lambda match: old[match[1]], name)


OLD_NAMES = {
    "gamma and beta": ("bert", to_gamma_and_beta),
    "weight norm": ("wav2vec2", to_weight_norm),
    "weight norm in a sub-model": ("speech_encoder_decoder", to_weight_norm),
    "no prefix": ("gpt2", lambda name: name.removeprefix("transformer.")),
    "no prefix, tied": ("llama-tied", lambda name: name.removeprefix("model.")),
}


@pytest.mark.parametrize("era", OLD_NAMES)
def test_load_names_of_older_releases_equals_from_pretrained(era: str, saved: Directory, tmp_path: Path):
    name, rename = OLD_NAMES[era]
    architecture = BY_NAME[name]
    rewrite(saved(architecture), tmp_path / "old", rename)
    expected, found = reference(architecture.resolve(), tmp_path / "old"), lading.load(tmp_path / "old")
    assert_equal(model_differences(expected, found))
    assert_equal(output_differences(run(architecture, expected), run(architecture, found)))
    assert_equal(tensor_differences(architecture.build().state_dict(), found.state_dict()))


@pytest.mark.parametrize(
    ("name", "base_class"),
    [("bert", "BertModel"), ("t5", "T5EncoderModel"), ("llava", "LlavaModel"), ("vit", "ViTModel")],
)
def test_load_only_the_base_model_equals_from_pretrained(name: str, base_class: str, saved: Directory):
    architecture, model_class = BY_NAME[name], getattr(transformers, base_class)
    directory = saved(architecture)
    options = {"add_pooling_layer": False} if base_class in ("BertModel", "ViTModel") else {}
    expected = model_class.from_pretrained(directory, dtype="auto", **options)
    found = lading.load(directory, model_class=model_class, strict=False, **options)
    assert_equal(model_differences(expected, found))


def test_load_tensors_that_construction_shares_and_the_file_holds_once_are_right_or_refused(tmp_path: Path):
    """SeamlessM4Tv2 builds one embedding under three names, ties or no ties; transformers 4 loads two at random."""
    config = transformers.SeamlessM4Tv2Config(**BY_NAME["seamless_m4t_v2-untied"].config)
    architecture = BY_NAME["seamless_m4t_v2"]
    model = transformers.SeamlessM4Tv2ForTextToText(config).eval()
    model.save_pretrained(tmp_path)
    if MAJOR == 4:
        with pytest.raises(lading.MissingTensorError, match=r"text_encoder\.embed_tokens\.weight"):
            lading.load(tmp_path)
    else:
        found = lading.load(tmp_path)
        assert_equal(tensor_differences(model.state_dict(), found.state_dict()))
        assert_equal(output_differences(run(architecture, model), run(architecture, found)))
