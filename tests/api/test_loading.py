"""Hold `lading.load` and `lading.load_into` to their laws: complete, exact, nothing copied, no file changed.

What concerns whole processes (pages, sharing, spawning) stands in `test_loading_processes.py`; broken input in
`test_hostile.py`; equality with `from_pretrained` over all architectures in `tests/adapters`.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    set_seed,
)

import lading
from lading.api.arguments import BY_PLAN
from lading.errors import CheckpointError, CheckpointNotFoundError, MissingTensorError, PlanError
from models import Plain, build, example_input

# transformers 4.57 under torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

MAJOR = int(transformers.__version__.split(".")[0])
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128},
    **{"max_position_embeddings": 64},
}
IDS = torch.tensor([[5, 9, 2, 77, 31, 8]])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32 with a generation configuration, in one file."""
    directory = tmp_path_factory.mktemp("loading") / "llama"
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT: its decoder is tied to the embeddings and left out of the file."""
    directory = tmp_path_factory.mktemp("loading") / "bert"
    set_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture
def mine(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama that a test may change."""
    shutil.copytree(llama, tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def untouched(llama: Path) -> Iterator[None]:
    """Check after the test that the Llama's files are as they were, byte for byte."""
    before = digests(llama)
    yield
    gc.collect()
    assert digests(llama) == before


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


def reference(directory: Path, **options: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(directory, dtype="auto", **options)


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


# Without copying -----------------------------------------------------------------------------------------------------


def test_load_copies_nothing_and_reports_it(llama, untouched):
    model, report = lading.load(llama, output_loading_info=True)
    total = sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    assert (report.mapped_bytes, report.copied_bytes) == (total, sum(b.nbytes for b in model.buffers()))
    assert (report.missing, report.unexpected) == ((), ())
    assert report.num_tensors == len(load_file(llama / "model.safetensors"))
    assert report.loader == ("lading" if MAJOR >= 5 else "transformers")
    assert str(llama / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert not model.training
    assert_equal(model, reference(llama))


def test_load_of_a_tied_model_counts_its_bytes_once_and_keeps_the_tie(bert):
    model, report = lading.load(bert, output_loading_info=True)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert report.missing == ()
    assert report.mapped_bytes == sum(tensor.nbytes for tensor in load_file(bert / "model.safetensors").values())
    expected = BertForMaskedLM.from_pretrained(bert).eval()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_load_in_a_reduced_dtype_of_the_file_copies_nothing(llama, tmp_path):
    reference(llama).to(torch.bfloat16).save_pretrained(tmp_path)
    model, report = lading.load(tmp_path, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert report.copied_bytes == sum(buffer.nbytes for buffer in model.buffers())
    assert_equal(model, reference(tmp_path))


def test_edit_in_place_works_and_never_reaches_the_file(llama, untouched):
    model = lading.load(llama)
    before = model(IDS).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        model.model.norm.weight.data.add_(1)
    assert not torch.equal(model(IDS).logits, before)
    assert not model.model.layers[0].mlp.up_proj.weight[3].any()
    assert torch.equal(lading.load(llama)(IDS).logits, before)


def test_two_loads_of_one_file_do_not_see_each_others_edits(llama, untouched):
    first, second = lading.load(llama), lading.load(llama)
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert second.lm_head.weight.any()


def test_load_with_copy_is_immune_to_an_overwritten_file(mine, llama):
    model, report = lading.load(mine, copy=True, output_loading_info=True)
    assert report.mapped_bytes == 0
    expected = reference(llama)(IDS).logits
    path = mine / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(10)
    assert torch.equal(model(IDS).logits, expected)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_mapping_goes_with_the_model(llama):
    model = lading.load(llama)
    assert str(llama) in Path("/proc/self/maps").read_text()
    del model
    gc.collect()
    assert str(llama) not in Path("/proc/self/maps").read_text()


# Copies of parts -----------------------------------------------------------------------------------------------------


def layer_bytes(layer: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def test_deepcopy_pickle_and_save_of_one_layer_hold_that_layers_bytes(llama, untouched):
    model = lading.load(llama)
    layer = model.model.layers[1]
    own = layer_bytes(layer)
    slack = 16_384  # names, shapes, the configuration and the container's own bytes
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert own <= len(buffer.getvalue()) < own + slack
    assert own <= len(pickle.dumps(layer)) < own + slack
    copied = copy.deepcopy(layer)
    assert sum(p.untyped_storage().nbytes() for p in copied.parameters()) == own
    with torch.no_grad():
        copied.mlp.up_proj.weight.zero_()
    assert layer.mlp.up_proj.weight.any()


def test_deepcopy_and_pickle_of_the_model_run_alike(llama, untouched):
    model = lading.load(llama)
    expected = model(IDS).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS).logits, expected)
        assert copied.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_torch_save_and_load_of_the_state_give_it_back(llama, tmp_path):
    model = lading.load(llama)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_save_pretrained_elsewhere_gives_an_equal_checkpoint(llama, tmp_path, untouched):
    model = lading.load(llama)
    model.save_pretrained(tmp_path / "saved")
    assert_equal(lading.load(tmp_path / "saved"), model)
    assert_equal(reference(tmp_path / "saved"), model)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["into one file", "into shards"])
@pytest.mark.parametrize("is_edited", [False, True], ids=["as loaded", "edited"])
def test_save_pretrained_onto_its_own_directory_keeps_model_and_file_right(mine, is_sharded, is_edited):
    options = {"max_shard_size": "40KB"} if is_sharded else {}
    if is_sharded:
        whole = reference(mine)
        (mine / "model.safetensors").unlink()
        whole.save_pretrained(mine, **options)
        assert len(list(mine.glob("model-*.safetensors"))) > 2
    model = lading.load(mine)
    if is_edited:
        with torch.no_grad():
            model.lm_head.weight.mul_(3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS).logits
    model.save_pretrained(mine, **options)
    assert torch.equal(model(IDS).logits, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    again = lading.load(mine)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(IDS).logits, expected)
    model.save_pretrained(mine, **options)  # and once more, from pages of a file that has no name by now
    assert torch.equal(lading.load(mine)(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)


def test_to_another_dtype_and_back_leaves_the_file(llama, untouched):
    model = lading.load(llama)
    expected = reference(llama).to(torch.bfloat16)(IDS).logits
    assert torch.equal(model.to(torch.bfloat16)(IDS).logits, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    gc.collect()
    assert str(llama) not in Path("/proc/self/maps").read_text()


def test_share_memory_moves_the_weights_and_runs_alike(llama, untouched):
    model = lading.load(llama)
    expected = model(IDS).logits
    assert not any(parameter.is_shared() for parameter in model.parameters())
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad():
        model.lm_head.weight.zero_()


def test_generate_twice_equals_from_pretrained(llama, untouched):
    model, expected = lading.load(llama), reference(llama)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    first, second = model.generate(IDS, **options), model.generate(IDS, **options)
    assert first.shape == (1, IDS.shape[1] + 20)
    assert torch.equal(first, second)
    assert torch.equal(first, expected.generate(IDS, **options))


def test_training_step_equals_from_pretrained_and_leaves_the_file(llama, untouched):
    models = [lading.load(llama), reference(llama)]
    assert [p.requires_grad for p in models[0].parameters()] == [p.requires_grad for p in models[1].parameters()]
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
        model.eval()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in models]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])
    assert_equal(*models)


def test_many_threads_run_one_loaded_model_alike(llama):
    model = lading.load(llama)
    inputs = [torch.randint(3, 128, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    expected = [model(ids).logits for ids in inputs]
    fresh = lading.load(llama)  # nothing of it touched yet
    barrier, outputs = threading.Barrier(len(inputs)), [None] * len(inputs)

    def work(index: int) -> None:
        barrier.wait()
        with torch.no_grad():
            outputs[index] = fresh(inputs[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sharded", "bin", "legacy bin", "sharded bin"])
def test_load_of_each_layout_gives_the_same_model(llama, tmp_path, layout):
    model = reference(llama)
    directory = tmp_path / "model"
    model.save_pretrained(directory, **({"max_shard_size": "40KB"} if layout == "sharded" else {}))
    if layout != "sharded":
        state = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        if layout == "sharded bin":
            names = sorted(state)
            parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for file, kept in parts.items():
                torch.save({name: state[name] for name in kept}, directory / file)
            index = {"metadata": {}, "weight_map": {name: file for file, kept in parts.items() for name in kept}}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    loaded, report = lading.load(directory, output_loading_info=True)
    assert_equal(loaded, model)
    assert report.mapped_bytes + report.copied_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if layout != "legacy bin":  # whose data stand wherever the pickles end
        assert report.copied_bytes == sum(buffer.nbytes for buffer in model.buffers())


def test_load_of_bin_beside_safetensors_takes_safetensors(mine):
    torch.save({"wrong": torch.ones(1)}, mine / "pytorch_model.bin")
    assert_equal(lading.load(mine), reference(mine))


def test_load_of_the_weight_file_itself_takes_the_configuration_beside_it(llama):
    model = lading.load(llama / "model.safetensors")
    assert_equal(model, reference(llama))
    assert model.config.name_or_path == str(llama)


def test_load_of_a_path_object_or_a_string_is_alike(llama, monkeypatch):
    assert_equal(lading.load(llama), lading.load(str(llama)))
    monkeypatch.chdir(llama.parent)
    assert_equal(lading.load("llama"), lading.load(llama))
    assert lading.load("./llama").config.name_or_path == "./llama"


def test_load_with_subfolder_and_variant(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "repo" / "part")
    assert_equal(lading.load(tmp_path / "repo", subfolder="part"), reference(llama))
    path = tmp_path / "repo" / "part" / "model.safetensors"
    path.rename(path.with_name("model.special.safetensors"))
    assert_equal(lading.load(tmp_path / "repo", subfolder="part", variant="special"), reference(llama))
    with pytest.raises(CheckpointNotFoundError, match=r"found only model\.special\.safetensors"):
        lading.load(tmp_path / "repo", subfolder="part")
    with pytest.raises(CheckpointNotFoundError, match="no such directory"):
        lading.load(tmp_path / "repo", subfolder="other")


def fill_cache(cache: Path, directory: Path, commits: dict[str, str], *, under: str = "") -> None:
    """Lay a checkpoint out as the hub's cache does, once for each of {ref: commit}."""
    root = cache / "models--org--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for path in directory.iterdir():
        shutil.copy(path, root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest())
    for ref, commit in commits.items():
        (root / "refs" / ref).write_text(commit)
        snapshot = root / "snapshots" / commit / under
        snapshot.mkdir(parents=True)
        for path in directory.iterdir():
            (snapshot / path.name).symlink_to(root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest())


def test_load_of_a_repo_id_from_the_cache_by_revision(llama, tmp_path):
    fill_cache(tmp_path, llama, {"main": "a" * 40, "v1": "b" * 40})
    for revision in (None, "main", "v1", "b" * 40):
        model = lading.load("org/tiny", cache_dir=tmp_path, revision=revision, local_files_only=True)
        assert_equal(model, reference(llama))
        assert model.generation_config.max_new_tokens == 7
    assert model.config.name_or_path == "org/tiny"
    with pytest.raises(CheckpointNotFoundError, match="org/tiny at v2"):
        lading.load("org/tiny", cache_dir=tmp_path, revision="v2")


def test_load_of_a_repo_id_with_subfolder(llama, tmp_path):
    fill_cache(tmp_path, llama, {"main": "a" * 40}, under="part")
    assert_equal(lading.load("org/tiny", cache_dir=str(tmp_path), subfolder="part"), reference(llama))


def test_load_into_of_a_repo_id_with_subfolder_and_revision(tmp_path, monkeypatch):
    save_file(build(Plain).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "only").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "only" / "model.safetensors")
    fill_cache(tmp_path / "cache", tmp_path / "only", {"main": "a" * 40, "v1": "c" * 40}, under="part")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with lading.empty():
        net = Plain()
    lading.load_into(net, "org/tiny", revision="v1", subfolder="part")
    assert torch.equal(net.eval()(example_input()), build(Plain)(example_input()))


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=repr)
def test_load_with_a_dtype_casts_as_from_pretrained(llama, dtype, untouched):
    model, report = lading.load(llama, dtype=dtype, output_loading_info=True)
    expected = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert_equal(model, expected)
    assert model.dtype == torch.bfloat16
    assert report.mapped_bytes == 0
    assert report.loader == "transformers"


def test_load_with_torch_dtype_and_low_cpu_mem_usage_keeps_their_old_meaning(llama):
    expected = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    for options in (
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
    ):
        assert_equal(lading.load(llama, **options), expected)
    for low_cpu_mem_usage in (True, False, None):
        assert_equal(lading.load(llama, low_cpu_mem_usage=low_cpu_mem_usage), reference(llama))
    assert_equal(lading.load(llama, torch_dtype="auto"), reference(llama))
    with pytest.raises(
        TypeError, match=r"found dtype=torch\.float16 and torch_dtype=torch\.bfloat16 · expected one of them"
    ):
        lading.load(llama, dtype=torch.float16, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"dtype: found 'bloat16' · expected 'auto', a torch.dtype or its name"):
        lading.load(llama, dtype="bloat16")


def test_load_with_dtype_none_does_as_from_pretrained(llama, tmp_path):
    reference(llama).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=None)
    assert_equal(lading.load(tmp_path, dtype=None), expected)


def test_load_with_dtype_none_heeds_a_configuration_that_differs_from_the_file(llama, tmp_path):
    reference(llama).to(torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=None)
    assert_equal(lading.load(tmp_path, dtype=None), expected)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), None], ids=repr)
def test_load_with_the_cpu_as_device_map_copies_nothing(llama, device_map):
    model, report = lading.load(llama, device_map=device_map, output_loading_info=True)
    assert report.copied_bytes == sum(buffer.nbytes for buffer in model.buffers())
    assert_equal(model, reference(llama))


@pytest.mark.parametrize(
    "device_map",
    ["auto", "balanced", "balanced_low_0", "sequential", "disk", {"model": "cpu", "lm_head": "disk"}, {"": "disk"}],
    ids=repr,
)
def test_load_with_several_devices_streams_what_rests_elsewhere(llama, device_map):
    room = {"cpu": "90KB"} if isinstance(device_map, str) and device_map in BY_PLAN else None
    model = lading.load(llama, device_map=device_map, max_memory=room)
    residency = lading.Residency.of(model)
    assert torch.equal(model(IDS).logits, reference(llama)(IDS).logits)
    assert residency.stats().fetches > 0
    assert residency.stats().spilled_bytes == 0
    residency.close()
    assert_equal(model, reference(llama))


def test_load_with_a_device_map_that_leaves_blocks_out_refuses(llama):
    for device_map, lost in (({}, "'model.embed_tokens'"), ({"model": "cpu"}, "'lm_head'")):
        with pytest.raises(
            PlanError, match=rf"device_map: found no device for .*{lost}.* expected one device for each"
        ):
            lading.load(llama, device_map=device_map)


def test_load_with_two_ways_to_say_where_blocks_rest_refuses(llama):
    plan = lading.plan(llama, {"cpu": "1GB"})
    for options in ({"device_map": "auto"}, {"max_memory": {"cpu": "1GB"}}):
        with pytest.raises(PlanError, match=r"found plan and device_map or max_memory .* pass the plan alone"):
            lading.load(llama, plan=plan, **options)
    for device_map in (None, "cpu", {"": "disk"}):
        with pytest.raises(
            PlanError, match=r"found max_memory and device_map=.* expected device_map=\"auto\" · add it"
        ):
            lading.load(llama, device_map=device_map, max_memory={"cpu": "1GB"})
    assert_equal(lading.load(llama, plan=plan), reference(llama))


def test_load_with_a_model_class_of_every_spelling(bert, llama):
    expected = BertModel.from_pretrained(bert, add_pooling_layer=False)
    for model_class in (BertModel, "BertModel"):
        with pytest.raises(MissingTensorError, match=r"no tensor for 'pooler.*; left over are 'cls.predictions"):
            lading.load(bert, model_class=model_class)
        model, report = lading.load(bert, model_class=model_class, strict=False, output_loading_info=True)
        assert type(model) is BertModel
        assert torch.equal(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)
        assert all(name.startswith("cls.") for name in report.unexpected)
        assert all(name.startswith("pooler.") for name in report.missing)
    for model_class in (AutoModelForCausalLM, "AutoModelForCausalLM", LlamaForCausalLM, None):
        assert type(lading.load(llama, model_class=model_class)) is LlamaForCausalLM
    with pytest.raises(
        CheckpointError, match=r"'NoSuchClass' for a LlamaConfig.*expected a model class of transformers"
    ):
        lading.load(llama, model_class="NoSuchClass")
    with pytest.raises(CheckpointError, match=r"AutoModelForVision2Seq|AutoModelForImageClassification"):
        lading.load(llama, model_class="AutoModelForImageClassification")


def test_load_of_a_head_from_a_base_checkpoint_lists_what_is_missing(bert, tmp_path):
    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(MissingTensorError, match=r"found no tensor for 'cls.predictions.* this is a new head"):
        lading.load(tmp_path, model_class=BertForMaskedLM)
    model, report = lading.load(tmp_path, model_class=BertForMaskedLM, strict=False, output_loading_info=True)
    assert "cls.predictions.transform.dense.weight" in report.missing
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert report.copied_bytes > 0


def test_load_with_a_config_and_an_attention_implementation(llama):
    config = LlamaConfig.from_pretrained(llama)
    before = config.to_dict()
    assert_equal(lading.load(llama, config=config), reference(llama))
    assert config.to_dict() == before, "the caller's configuration was changed"
    eager = lading.load(llama, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    expected = reference(llama, attn_implementation="eager")
    assert torch.equal(eager(IDS).logits, expected(IDS).logits)


def test_load_reads_the_generation_configuration(llama, mine):
    assert lading.load(llama).generation_config.max_new_tokens == 7
    assert lading.load(llama).generation_config.to_dict() == reference(llama).generation_config.to_dict()
    (mine / "generation_config.json").unlink()
    assert lading.load(mine).generation_config.to_dict() == reference(mine).generation_config.to_dict()


def test_load_with_output_loading_info_reports_a_cast_and_what_was_initialised(bert):
    model, report = lading.load(bert, dtype="bfloat16", output_loading_info=True)
    own = sum({p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}.values())
    assert (report.mapped_bytes, report.copied_bytes) == (0, own)
    assert report.num_tensors == len(load_file(bert / "model.safetensors"))
    assert isinstance(report, lading.LoadReport)
    with pytest.raises((AttributeError, TypeError)):
        report.missing = ()


def test_load_with_readahead_ends_its_thread_and_gives_the_same(llama, untouched):
    model = lading.load(llama, readahead=True)
    for thread in [thread for thread in threading.enumerate() if thread.name == "lading-readahead"]:
        thread.join(30)
        assert not thread.is_alive()
    assert_equal(model, reference(llama))


def test_load_changes_nothing_in_the_process(llama):
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ), torch.get_num_threads())
    hooks = len(torch.nn.modules.module._global_parameter_registration_hooks)
    state = torch.random.get_rng_state()
    lading.load(llama)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ), torch.get_num_threads()) == before
    assert len(torch.nn.modules.module._global_parameter_registration_hooks) == hooks
    assert torch.equal(torch.random.get_rng_state(), state), "loading drew random numbers"
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_load_leaves_no_hooks_on_the_model(llama):
    for module in lading.load(llama).modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


# Remote code ---------------------------------------------------------------------------------------------------------

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig
Path(SENTINEL).touch()
class TinyConfig(PretrainedConfig):
    model_type = "lading_tiny"
    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING = """
from pathlib import Path
import torch
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig
Path(SENTINEL).touch()
class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, config.width)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, x):
        return self.linear(x)
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with code of its own, which leaves a file behind when it runs."""
    directory = tmp_path / "remote"
    directory.mkdir()
    sentinel = f"SENTINEL = {str(tmp_path / 'sentinel')!r}\n"
    (directory / "configuration_tiny.py").write_text(sentinel + CONFIGURATION)
    (directory / "modeling_tiny.py").write_text(sentinel + MODELING)
    config = {
        "model_type": "lading_tiny",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"},
        "width": 3,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": torch.eye(3) * 2, "linear.bias": torch.ones(3)}, directory / "model.safetensors")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    elsewhere = [path for path in sys.path if Path(path, "transformers_modules").exists()]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in elsewhere])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another test's repository, in another folder
    return directory


def test_load_without_trust_refuses_remote_code_and_runs_none(remote, tmp_path):
    with pytest.raises(CheckpointError, match=r"(?s)config\.json: found .*trust_remote_code=True"):
        lading.load(remote)
    assert not (tmp_path / "sentinel").exists()


def test_load_without_trust_of_remote_modeling_code_alone_refuses(remote, tmp_path):
    config = json.loads((remote / "config.json").read_text())
    config["model_type"] = "bert"
    del config["auto_map"]["AutoConfig"]
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"'TinyModel'.*code stands in the repository.*pass trust_remote_code=True"
    ):
        lading.load(remote)
    assert not (tmp_path / "sentinel").exists()


def test_load_with_trust_runs_the_repositorys_code(remote, tmp_path):
    model = lading.load(remote, trust_remote_code=True)
    assert (tmp_path / "sentinel").exists()
    assert type(model).__name__ == "TinyModel"
    assert model(torch.ones(1, 3)).tolist() == [[3.0, 3.0, 3.0]]


# DeepSpeed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def zero_init(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What `deepspeed.zero.Init` leaves for others to see while it is active: a count in its module."""
    module = types.ModuleType("deepspeed.runtime.zero.partition_parameters")
    module.zero_init_context = 1
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_load_under_zero_init_refuses(llama, zero_init):
    with lading.empty():
        net = Plain()
    for call in (lambda: lading.load(llama), lambda: lading.load_into(net, llama)):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert "found an active deepspeed.zero.Init" in str(caught.value)
        assert "expected whole parameters" in str(caught.value)
        assert "load outside of" in str(caught.value)
    zero_init.zero_init_context = 0
    assert lading.load(llama).lm_head.weight.shape == (128, 32)


# Larger than memory --------------------------------------------------------------------------------------------------


def sparse_checkpoint(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> int:
    """Write a header for tensors (dtype, shape, bytes each element) over a hole; give the file's size."""
    header, end = {}, 0
    for name, (dtype, shape, item_bytes) in tensors.items():
        num_bytes = int(torch.Size(shape).numel()) * item_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_load_into_of_a_checkpoint_larger_than_memory_maps_and_runs(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(rows, 1024, dtype=torch.bfloat16)
            self.out = torch.nn.Linear(1024, 2, dtype=torch.bfloat16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids) + 1)

    rows = memory_bytes() * 3 // 2 // 2048
    shapes = {
        "out.bias": ("BF16", [2], 2),
        "out.weight": ("BF16", [2, 1024], 2),
        "table.weight": ("BF16", [rows, 1024], 2),
    }
    size = sparse_checkpoint(tmp_path / "model.safetensors", shapes)
    assert size > memory_bytes()
    with lading.empty():
        net = Net()
    report = lading.load_into(net, tmp_path)
    assert report.copied_bytes == 0
    assert report.mapped_bytes > memory_bytes()
    with torch.no_grad():
        net.out.weight.fill_(0.5)
        net.table.weight[rows - 1] = 1
        assert net(torch.tensor([0, rows // 2, rows - 1])).tolist() == [
            [512.0, 512.0],
            [512.0, 512.0],
            [1024.0, 1024.0],
        ]
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_load_of_a_checkpoint_larger_than_memory_maps_and_runs(tmp_path):
    wide = memory_bytes() * 5 // 4 // (16 * 3 * 64 * 2)  # 48 matrices of 64 columns in two bytes
    sizes = {**SIZES, "hidden_size": 64, "num_hidden_layers": 16, "intermediate_size": wide}
    config = LlamaConfig(**sizes, architectures=["LlamaModel"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: ("BF16", list(tensor.shape), 2) for name, tensor in LlamaModel(config).state_dict().items()}
    config.save_pretrained(tmp_path)
    assert sparse_checkpoint(tmp_path / "model.safetensors", shapes) > memory_bytes()
    model, report = lading.load(tmp_path, output_loading_info=True)
    assert report.mapped_bytes > memory_bytes()
    with torch.no_grad():
        model.embed_tokens.weight.fill_(1)
        model.layers[7].mlp.up_proj.weight[5] = 0.5
        hidden = model.embed_tokens(torch.tensor([[1, 2]]))
        assert torch.nn.functional.linear(hidden, model.layers[7].mlp.up_proj.weight[4:6]).tolist() == [
            [[0.0, 32.0], [0.0, 32.0]]
        ]
