"""`transformers.pipeline` takes a loaded model for what it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, pipeline

import lading
from models import save_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
WORDS = ["<end>", "<unknown>", *"abcdefg"]


@pytest.mark.parametrize(
    ("task", "cls", "config"),
    [("text-generation", LlamaForCausalLM, LlamaConfig), ("feature-extraction", BertForMaskedLM, BertConfig)],
)
def test_a_pipeline_over_a_loaded_model_gives_what_it_gives_over_from_pretrained(tmp_path, task, cls, config):
    torch.manual_seed(0)
    cls(config(**SIZES)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, WORDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
    found, expected = (
        pipeline(task, model=model, tokenizer=tokenizer, device="cpu")("a b c", **options)
        for model in (lading.load(tmp_path), cls.from_pretrained(tmp_path))
    )
    assert found == expected
