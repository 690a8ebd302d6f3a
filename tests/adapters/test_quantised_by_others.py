"""Checkpoints of torchao, FP8 and compressed-tensors load as from_pretrained loads them, or are refused by name."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lading
from lading.errors import CheckpointError, PlanError

pytestmark = [
    pytest.mark.needs("torchao", "compressed_tensors"),
    pytest.mark.filterwarnings("ignore"),  # these libraries warn about each other's releases
]
BLOCK = 32


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def quantised(plain, folder, quantise, **settings):
    """Write a checkpoint in which each projection's weight is replaced by what ``quantise`` makes of it."""
    shutil.copytree(plain, folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors.update(quantise(name, weight) if name.endswith("proj.weight") else {name: weight})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.fixture
def fp8(plain, tmp_path):
    def quantise(name, weight):
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        packed = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
        return {name: packed, f"{name}_scale_inv": scale.reshape(rows, columns)}

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return quantised(plain, tmp_path / "fp8", quantise, **settings)


@pytest.fixture
def compressed(plain, tmp_path):
    def quantise(name, weight):
        scale = (weight.float().abs().max() / 448).reshape(1).to(torch.bfloat16)
        packed = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
        return {name: packed, f"{name}_scale": scale}

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return quantised(
        plain,
        tmp_path / "compressed",
        quantise,
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        config_groups={"group_0": group},
        ignore=["lm_head"],
    )


@pytest.fixture
def torchao(plain, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=settings, dtype="auto", device_map="cpu")
    is_safe = int(__import__("transformers").__version__[0]) >= 5
    model.save_pretrained(tmp_path / "torchao", **({} if is_safe else {"safe_serialization": False}))
    return tmp_path / "torchao"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def assert_as_from_pretrained(folder):
    expected = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    model, report = lading.load(folder, output_loading_info=True)
    weight, theirs = (m.model.layers[0].self_attn.q_proj.weight for m in (model, expected))
    assert (type(weight), weight.dtype) == (type(theirs), theirs.dtype)
    assert torch.equal(logits(model), logits(expected))
    assert report.missing == report.unexpected == ()


@pytest.mark.transformers5  # transformers 4 asks for a GPU
def test_load_of_fp8_that_transformers_dequantises_equals_from_pretrained(fp8):
    assert_as_from_pretrained(fp8)
    model = lading.load(fp8)
    total = lading.plan(fp8, {"cpu": "1GiB"}).total_bytes
    assert total == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.transformers4
def test_load_of_fp8_on_a_machine_that_transformers_refuses_names_the_checkpoint(fp8):
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(fp8))}: found a quantised .*GPU.* · install"):
        lading.load(fp8)


def test_load_of_compressed_tensors_equals_from_pretrained(compressed):
    assert_as_from_pretrained(compressed)


def test_plan_and_offload_of_what_is_decompressed_in_the_first_forward_are_refused(compressed):
    for call in (
        lambda: lading.plan(compressed, {"cpu": "1GiB"}),
        lambda: lading.load(compressed, device_map="auto", max_memory={"cpu": "1GiB"}),
        lambda: lading.offload(lading.load(compressed), {"": "disk"}),
    ):
        with pytest.raises(
            PlanError, match="compressed-tensors checkpoint, which is decompressed in the first forward"
        ):
            call()


@pytest.mark.transformers5
def test_load_of_torchao_equals_from_pretrained(torchao):
    assert_as_from_pretrained(torchao)


@pytest.mark.transformers4
def test_load_of_pickled_torchao_names_what_is_never_run(torchao):
    with pytest.raises(CheckpointError, match=r"_rebuild_from_type_v2, which lading never runs .* as safetensors"):
        lading.load(torchao)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_load_of_a_quantiser_that_is_not_here_is_refused_by_name(plain, tmp_path, method):
    folder = quantised(plain, tmp_path / method, lambda name, weight: {name: weight}, quant_method=method, bits=4)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(folder))}.*: found .*{method}|(?i:{method})"):
        lading.load(folder)
    with pytest.raises((CheckpointError, PlanError), match=f"(?i){method}"):
        lading.plan(folder, {"cpu": "1GiB"})
