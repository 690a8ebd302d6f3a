"""Prove that a skeleton, made without weights, says name by name what the loaded model is.

The reference is the model that `lading.load` gives, on every architecture of the zoo (a sample by default).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lading
from architectures import MAJOR, Architecture
from lading.adapters.model_request import ModelRequest
from lading.adapters.skeleton import Skeleton, describe_module, skeleton_of
from lading.checkpoint.locate import Source
from lading.placement.blocks import BlockRules, blocks_of
from zoo import BY_NAME, EVERY, QUIET, Directory, named_tensors, ties

pytestmark = QUIET
DTYPES = ["auto", torch.float32, torch.bfloat16, torch.float16, None]


def skeleton(path: Path | str, **options) -> Skeleton:
    """Return the skeleton of what lies at a path."""
    return skeleton_of(ModelRequest(source=Source(path_or_repo_id=str(path)), **options))


def where(tensor: torch.Tensor) -> tuple:
    """Return what two tensors with the same bytes have in common, also on meta."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def facts(model: nn.Module) -> dict[str, tuple]:
    """Return shape, dtype and bytes by name."""
    return {name: (tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in named_tensors(model).items()}


def predicted_dtypes(described: Skeleton) -> dict[str, torch.dtype]:
    """Return what a skeleton says of the dtype of each tensor."""
    return {name: described.loaded_dtypes.get(name, described.dtype) for name in named_tensors(described.module)}


def planned_bytes(described: Skeleton) -> list[tuple[str, int]]:
    """Return what the planner makes of a skeleton: its blocks and their bytes."""
    rules = BlockRules(
        no_split_classes=frozenset(described.no_split_classes),
        dtype=described.dtype,
        special_dtypes=described.loaded_dtypes,
        special_bytes=described.loaded_bytes,
    )
    return [(block.name, block.total_bytes) for block in blocks_of(described.module, rules)]


def declared(model: nn.Module) -> set[str]:
    """Return the classes that transformers itself would not split."""
    collect = getattr(model, "_get_no_split_modules", None)  # until 5.0; later each model holds those inside it too
    return set(model._no_split_modules if collect is None else collect("auto"))


# -- the zoo


@pytest.mark.parametrize("architecture", EVERY)
def test_skeleton_of_any_architecture_is_the_loaded_model(architecture: Architecture, saved: Directory):
    directory = saved(architecture)
    for dtype in DTYPES:
        found, expected = skeleton(directory, dtype=dtype), lading.load(directory, dtype=dtype)
        assert facts(found.module) == facts(expected), dtype
        assert predicted_dtypes(found) == {name: each.dtype for name, each in named_tensors(expected).items()}, dtype
        assert ties(found.module) == ties(expected), dtype
        assert found.loaded_bytes == {}
        if ties(expected) == ties(expected, where):  # SAM of version 4 has one that is no tie by identity
            assert planned_bytes(found) == planned_bytes(describe_module(expected)), dtype
        assert set(found.no_split_classes) == declared(expected)
        assert not found.module.training
        assert torch.get_default_dtype() == torch.float32
    assert predicted_dtypes(describe_module(expected)) == {n: t.dtype for n, t in named_tensors(expected).items()}


# -- where the dtype comes from


def llama(path: Path, dtype: torch.dtype | None, **options) -> Path:
    """Save a tiny Llama whose configuration names a dtype or none."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, **options
    )
    LlamaForCausalLM(config).to(dtype or torch.bfloat16).save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        written.pop(key, None)
    (path / "config.json").write_text(json.dumps(written | ({} if dtype is None else {"dtype": str(dtype)[6:]})))
    return path


@pytest.mark.parametrize("dtype", ["auto", None, torch.float64])
def test_skeleton_without_a_dtype_in_the_configuration_takes_the_checkpoints(tmp_path: Path, dtype):
    path = llama(tmp_path, None)
    found, expected = skeleton(path, dtype=dtype), lading.load(path, dtype=dtype)
    assert facts(found.module) == facts(expected)
    assert found.dtype == (expected.dtype)


@pytest.mark.parametrize("left", ["nothing", "the index"])
def test_skeleton_without_a_dtype_and_without_shards_is_float32(tmp_path: Path, left: str):
    path = llama(tmp_path, None)
    (path / "model.safetensors").unlink()
    if left == "the index":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert skeleton(path).dtype == torch.float32


def test_skeleton_of_a_configuration_object_needs_no_directory():
    config = BY_NAME["t5"].resolve().config_class(**BY_NAME["t5"].config)
    options = {"model_class": BY_NAME["t5"].model_class, "dtype": torch.float16, "model_kwargs": {"config": config}}
    before = config.to_dict()
    found = skeleton("", **options)
    assert found.dtype == torch.float16
    assert {name.rpartition(".wo")[2] for name in found.loaded_dtypes} == {".weight"}  # kept in float32
    assert config.to_dict() == before


def test_skeleton_of_a_cached_repository_with_nothing_but_its_configuration(tmp_path: Path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0123")
    LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(snapshot)
    source = Source(path_or_repo_id="org/name", cache_dir=str(tmp_path))
    found = skeleton_of(ModelRequest(source=source))
    assert found.dtype == torch.bfloat16
    assert all(tensor.is_meta for tensor in found.module.parameters())


def test_skeleton_passes_arguments_of_the_model_on_and_refuses_others(saved: Directory):
    bare = skeleton(saved(BY_NAME["bert"]), model_class="BertModel", model_kwargs={"add_pooling_layer": False})
    assert not [name for name in named_tensors(bare.module) if "pooler" in name]
    with pytest.raises(lading.PlanError, match="the arguments 'tp_plan', which may change what is loaded"):
        skeleton(saved(BY_NAME["bert"]), model_kwargs={"tp_plan": "auto"})
    with pytest.raises(TypeError, match=r"found gguf_file= .* use transformers' from_pretrained"):
        skeleton(saved(BY_NAME["bert"]), model_kwargs={"gguf_file": "x.gguf"})


def test_skeleton_without_a_configuration_is_refused(tmp_path: Path):
    with pytest.raises(lading.CheckpointError, match=r"config\.json"):
        skeleton(tmp_path)


def test_describe_module_finds_the_model_inside_a_wrapper_and_changes_nothing():
    model = BY_NAME["t5"].build()
    before = facts(model)
    found = describe_module(nn.ModuleDict({"inner": model}), torch.float16)
    assert {name for name in found.loaded_dtypes if "wo" in name} == {
        f"inner.{name}" for name in before if ".wo." in name
    }
    assert found.no_split_classes == describe_module(model).no_split_classes != ()
    assert facts(model) == before


def test_skeleton_of_huge_models_takes_little_memory():
    """A process's peak before and after: transformers is imported and has built one, then come 671 billion."""
    code = (
        "import resource, torch, transformers\n"
        "from lading.adapters.skeleton import skeleton_of, ModelRequest\n"
        "from lading.checkpoint.locate import Source\n"
        "for layers, experts in (4, 8), (61, 256):\n"
        "    config = transformers.DeepseekV3Config(num_hidden_layers=layers, n_routed_experts=experts)\n"
        "    config.architectures = ['DeepseekV3ForCausalLM']\n"
        "    source, options = Source(path_or_repo_id=''), {'config': config}\n"
        "    found = skeleton_of(ModelRequest(source=source, dtype=torch.bfloat16, model_kwargs=options))\n"
        "    num_bytes = sum(tensor.nbytes for tensor in found.module.parameters())\n"
        "    print(num_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    output = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True)
    small, num_bytes, large = (int(word) for word in output.split()[-3:])
    assert num_bytes > 1.3e12
    tree = 0 if MAJOR == 5 else 75_397 * 3  # KiB: in version 4 each expert is four modules
    assert large - small < 100_000 + tree


# -- quantised

bitsandbytes = [pytest.mark.needs("bitsandbytes"), pytest.mark.filterwarnings("ignore")]
HOW = {
    "8": {"load_in_8bit": True},
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4, in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
}


def held_bytes(value, seen: set[int]) -> int:
    """Count the bytes of a tensor and all tensors it refers to, each storage once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        own = 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
        return own + sum(held_bytes(part, seen) for part in vars(value).values())
    if type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module):
        return sum(held_bytes(part, seen) for part in vars(value).values())
    return 0


def predicted_bytes(described: Skeleton) -> int:
    """Add up what a skeleton says, tied tensors once."""
    sizes = {}
    for name, tensor in named_tensors(described.module).items():
        dtype = described.loaded_dtypes.get(name, described.dtype)
        sizes[id(tensor)] = described.loaded_bytes.get(name, tensor.numel() * dtype.itemsize)
    return sum(sizes.values())


def assert_bytes_cover(described: Skeleton, model: nn.Module, *, within: float) -> None:
    """Prove that a prediction is not below the truth, by tensor, nor far above it, in all."""
    real = {name: held_bytes(tensor, set()) for name, tensor in named_tensors(model).items()}
    for name, tensor in named_tensors(described.module).items():
        dtype = described.loaded_dtypes.get(name, described.dtype)
        assert described.loaded_bytes.get(name, tensor.numel() * dtype.itemsize) >= real[name], name
    total = sum(held_bytes(tensor, set()) for tensor in {id(t): t for t in named_tensors(model).values()}.values())
    assert total <= predicted_bytes(described) <= total * (1 + within)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return llama(tmp_path / "plain", torch.bfloat16)


@pytest.mark.parametrize("how", [pytest.param(how, id=name, marks=bitsandbytes) for name, how in HOW.items()])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_skeleton_to_be_quantised_weighs_what_the_quantised_model_does(name: str, how, saved: Directory):
    options = {"quantization_config": transformers.BitsAndBytesConfig(**how)}
    path = saved(BY_NAME[name])
    found = skeleton(path, model_kwargs=options)
    model = lading.load(path, device_map="cpu", **options)
    assert type(found.module) is type(model)
    assert [type(part) for part in found.module.modules()] == [type(part) for part in model.modules()]
    assert set(found.loaded_bytes) == {
        name for name, tensor in named_tensors(model).items() if held_bytes(tensor, set()) > tensor.nbytes
    }
    assert_bytes_cover(found, model, within=0)
    assert describe_module(model).loaded_bytes == found.loaded_bytes
    assert all(tensor.is_meta for tensor in found.module.parameters())


@pytest.mark.parametrize("how", [pytest.param(HOW["8"], marks=bitsandbytes)])
def test_quantised_model_that_ran_weighs_what_it_did_before(how, saved: Directory):
    options = {"quantization_config": transformers.BitsAndBytesConfig(**how)}
    model = lading.load(saved(BY_NAME["llama"]), device_map="cpu", **options)
    everything = {0: 10**15}
    expected, plans = describe_module(model), [lading.plan(model, everything)]
    with torch.no_grad():
        model(torch.arange(12)[None])
    plans.append(lading.plan(model, everything))
    assert describe_module(model).loaded_bytes == expected.loaded_bytes != {}
    assert plans[0].total_bytes == plans[1].total_bytes == predicted_bytes(expected)


@pytest.mark.parametrize("how", [pytest.param(how, id=name, marks=bitsandbytes) for name, how in HOW.items()])
def test_skeleton_of_a_quantised_checkpoint_weighs_what_its_headers_say(how, tmp_path: Path):
    wide = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "plain")
    options = {"quantization_config": transformers.BitsAndBytesConfig(**how), "dtype": torch.float16}
    made = LlamaForCausalLM.from_pretrained(tmp_path / "plain", device_map="cpu", **options)
    made.save_pretrained(tmp_path / "quantised")
    model = lading.load(tmp_path / "quantised", device_map="cpu")
    assert_bytes_cover(skeleton(tmp_path / "quantised"), model, within=0.01)
    (tmp_path / "quantised" / "model.safetensors").unlink()
    assert_bytes_cover(skeleton(tmp_path / "quantised"), model, within=0)


@pytest.mark.parametrize("how", [pytest.param(HOW["4"], marks=bitsandbytes)])
def test_skeleton_of_a_quantised_checkpoint_with_strange_names_is_refused(how, large: Path, tmp_path: Path):
    options = {"quantization_config": transformers.BitsAndBytesConfig(**how)}
    made = LlamaForCausalLM.from_pretrained(large, device_map="cpu", **options)
    made.save_pretrained(tmp_path / "quantised")
    file = tmp_path / "quantised" / "model.safetensors"
    stored = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(lading.PlanError, match=r"renames or rebuilds: 'model\.layers\.0\.self_attn\.query\.weight'"):
        skeleton(tmp_path / "quantised")


def test_skeleton_with_a_quantizer_that_cannot_work_here_is_refused(saved: Directory):
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = LlamaConfig(**gptq, architectures=["LlamaForCausalLM"])
    with pytest.raises(lading.PlanError, match="install what it asks for, or plan where the model will be loaded"):
        skeleton("", model_kwargs={"config": config})
