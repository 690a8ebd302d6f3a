"""Quantised checkpoints go through transformers' quantizers and come out as theirs."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import lading

pytestmark = [
    pytest.mark.needs("bitsandbytes"),
    pytest.mark.filterwarnings("ignore"),  # bitsandbytes and torch warn about each other's releases
]
EIGHT_BITS = {"load_in_8bit": True}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    path = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def quantised(path, how):
    config = transformers.BitsAndBytesConfig(**how)
    return LlamaForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize(("quantisation", "layer"), [(EIGHT_BITS, "Linear8bitLt"), (FOUR_BITS, "Linear4bit")])
def test_load_quantised_checkpoint_equals_from_pretrained(plain, tmp_path, quantisation, layer):
    LlamaForCausalLM.from_pretrained(plain, quantization_config=quantisation, device_map="cpu").save_pretrained(
        tmp_path
    )
    expected = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    model, report = lading.load(tmp_path, output_loading_info=True)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == layer
    assert report.loader == "transformers"
    assert report.missing == report.unexpected == ()
    assert torch.equal(logits(model), logits(expected))


def test_load_quantising_on_the_fly_equals_from_pretrained(plain):
    expected = quantised(plain, EIGHT_BITS)
    config = transformers.BitsAndBytesConfig(**EIGHT_BITS)
    model = lading.load(plain, quantization_config=config, device_map="cpu")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    assert torch.equal(logits(model), logits(expected))


def test_plan_of_layers_whose_weights_no_quantizer_takes_is_refused_not_counted_as_plain(plain, monkeypatch):
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    config = transformers.BitsAndBytesConfig(**EIGHT_BITS)
    assert lading.plan(plain, quantization_config=config, max_memory={"cpu": "1GiB"})
    monkeypatch.setattr(Bnb8BitHfQuantizer, "param_needs_quantization", HfQuantizer.param_needs_quantization)
    with pytest.raises(
        lading.PlanError, match=r"LlamaForCausalLM: found layers of bitsandbytes, none of whose weights"
    ):
        lading.plan(plain, quantization_config=config, max_memory={"cpu": "1GiB"})
