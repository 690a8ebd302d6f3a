"""Generation code that a folder brings runs where the folder is trusted, and nowhere else."""

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


def test_load_without_trust_leaves_generation_code_alone(model_path):
    """transformers 4 runs that of a local folder unasked; here nobody's code does."""
    model = lading.load(model_path)
    assert "generate" not in vars(model)
    assert model.generate(inputs=torch.ones(1, 2, dtype=torch.long), max_new_tokens=1).shape == (1, 3)


@pytest.mark.transformers5
def test_load_where_transformers_reads_the_generation_config_otherwise_is_refused(model_path, monkeypatch):
    from transformers import GenerationMixin

    monkeypatch.delattr(GenerationMixin, "adjust_generation_fn")
    with pytest.raises(lading.CheckpointError, match="GenerationMixin without adjust_generation_fn"):
        lading.load(model_path)
