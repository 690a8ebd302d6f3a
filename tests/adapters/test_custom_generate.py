"""Generation code that a folder brings runs exactly where `from_pretrained` would run it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lading


@pytest.fixture
def model_path(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, inputs, **kwargs):\n    return inputs + 1\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    return tmp_path


def test_load_trusting_a_folder_generates_with_its_code(model_path):
    ids = torch.arange(3)[None]
    assert lading.load(model_path, trust_remote_code=True).generate(inputs=ids).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("trust", [True, False])
def test_load_takes_generation_code_where_from_pretrained_does(model_path, trust):
    """The two major versions disagree about an untrusted local folder."""
    expected = LlamaForCausalLM.from_pretrained(model_path, trust_remote_code=trust)
    model = lading.load(model_path, trust_remote_code=trust)
    assert ("generate" in vars(model)) == ("generate" in vars(expected))
