"""A model that tied its own tables when it was built: the list of what may be tied adds nothing to that."""

from __future__ import annotations

import torch
from transformers import FSMTConfig, FSMTForConditionalGeneration

import lading
from zoo import QUIET

pytestmark = QUIET


def test_plans_of_fsmt_count_the_tables_that_it_has():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=60, **sizes, **heads)
    model = FSMTForConditionalGeneration(config)
    tensors = [*model.parameters(), *model.buffers()]
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    with torch.device("meta"):
        empty = FSMTForConditionalGeneration(config)
    for subject in (model, empty, config):
        assert lading.plan(subject, {0: 10**12}).total_bytes == sum(held.values())
