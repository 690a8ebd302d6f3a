"""One device for the whole model: the weights arrive there as they stand in the file."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lading

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=9)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("device_map", ["cuda:0", {"": 0}, {"": "cuda:0"}, torch.device("cuda", 0)])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_load_onto_one_gpu_equals_from_pretrained(model_path, device_map, dtype):
    expected = LlamaForCausalLM.from_pretrained(model_path, dtype=dtype, device_map={"": 0})
    model = lading.load(model_path, dtype=dtype, device_map=device_map)
    ids = torch.arange(9, device="cuda")[None]
    for name, held in model.state_dict().items():
        assert held.device == torch.device("cuda", 0)
        assert torch.equal(held, expected.state_dict()[name])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
