"""An adapter in a model's folder is attached as transformers attaches it, or refused by name; also offloaded."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lading
from lading.errors import CheckpointError, MissingExtraError, MissingTensorError

pytestmark = [
    pytest.mark.needs("peft"),
    pytest.mark.filterwarnings("ignore::lading.placement.plan.PlanWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # asked by peft
]
IDS = torch.arange(1, 7)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a base model, an adapter that names it, and both in one folder, whose weights are others than the base's."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("peft")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=32,
        dtype="bfloat16",
    )
    for seed, name in enumerate(("base", "both")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / name)
    model = LlamaForCausalLM.from_pretrained(root / "base", dtype="auto")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(root / "alone")
    for file in (root / "alone").iterdir():
        if file.name.startswith("adapter_"):
            shutil.copy(file, root / "both")
    return root


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("place", ["alone", "both"])
@pytest.mark.parametrize("model_class", [None, AutoModelForCausalLM, LlamaForCausalLM])
def test_load_of_a_folder_with_an_adapter_gives_what_from_pretrained_gives(folders, place, model_class, caplog):
    expected = (model_class or AutoModelForCausalLM).from_pretrained(folders / place, dtype="auto")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model, report = lading.load(folders / place, model_class=model_class, output_loading_info=True)
    assert torch.equal(logits(model), logits(expected))
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert report.adapter == str(folders / place)
    assert report.mapped_bytes > 0.9 * sum(t.nbytes for name, t in ours.items() if "lora" not in name)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lading")]
    assert lines == [f"{folders / place}: adapter 'default' is attached to LlamaForCausalLM"]


def test_load_of_an_adapter_alone_runs_offloaded_with_the_same_bits(folders):
    expected = logits(lading.load(folders / "alone"))
    total = lading.plan(folders / "alone", {"cpu": "1GiB"}).total_bytes
    model = lading.load(folders / "alone", device_map="auto", max_memory={"cpu": total // 2})
    with lading.Residency.of(model) as residency:
        assert torch.equal(logits(model), expected)
        assert residency.stats().fetches > 0
        assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_plan_of_an_adapter_counts_its_weights_and_is_carried_out(folders):
    model = lading.load(folders / "alone")
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    plan = lading.plan(folders / "alone", {"cpu": "1GiB"})
    assert plan.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    half = lading.plan(folders / "alone", {"cpu": plan.total_bytes // 2})
    assert torch.equal(logits(lading.load(folders / "alone", plan=half)), logits(model))


def test_load_with_an_adapter_name_calls_it_so(folders):
    assert list(lading.load(folders / "alone", adapter_name="mine").peft_config) == ["mine"]


def test_load_of_an_adapter_without_all_its_tensors_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "alone", tmp_path / "copy")
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    del tensors[lost]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MissingTensorError, match=r"adapter 'default': found no tensor for '.*1.self_attn.q_proj.lora_B"
    ):
        lading.load(folder)


def test_load_of_an_adapter_without_a_base_is_refused_with_a_way_out(folders, tmp_path):
    folder = shutil.copytree(folders / "alone", tmp_path / "copy")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for named in (None, 3, ""):
        path.write_text(json.dumps({**config, "base_model_name_or_path": named}))
        with pytest.raises(CheckpointError, match=rf"base_model_name_or_path = {named!r} .* write its path or repo id"):
            lading.load(folder)
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="gone"):
        lading.load(folder)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: found .* expected a JSON object"):
        lading.load(folder)


def test_load_of_an_adapter_for_another_model_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "alone", tmp_path / "copy")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["no_such_module"]}))
    with pytest.raises(CheckpointError, match=r"found an adapter that cannot be attached \(.*no_such_module"):
        lading.load(folder)


@pytest.mark.parametrize("place", ["alone", "both"])
def test_load_of_an_adapter_without_peft_is_refused_and_names_it(folders, place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    for call in (lading.load, lambda path: lading.plan(path, {"cpu": "1GiB"})):
        with pytest.raises(MissingExtraError, match=r'found an adapter, and no package peft .* "lading\[peft\]"'):
            call(folders / place)


def test_plan_of_a_configuration_looks_for_no_adapter_where_it_stands(folders, monkeypatch):
    monkeypatch.chdir(folders / "alone")
    config = LlamaConfig.from_pretrained(folders / "base")
    plan = lading.plan(config, {"cpu": "1GiB"})
    assert not any("lora" in key for placement in plan.placements for key in placement.keys)
