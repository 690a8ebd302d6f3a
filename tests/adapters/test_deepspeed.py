"""Under ZeRO-3 every parameter is a slice: loading whole tensors there is refused, by the real library's own state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.needs("deepspeed")

PROLOGUE = """
import sys, deepspeed, torch.distributed, lading
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
stage3 = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
def load():
    try:
        return lading.load(sys.argv[1]).lm_head.weight.numel()
    except lading.CheckpointError as error:
        return str(error)
"""
INSIDE_ZERO_INIT = """
with deepspeed.zero.Init(config_dict_or_path=stage3):
    print(load())
print(load())
"""
WITH_LIVE_CONFIG = """
from transformers.integrations import HfDeepSpeedConfig
alive = HfDeepSpeedConfig(stage3)
print(load())
del alive
print(load())
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("code", "found"),
    [(INSIDE_ZERO_INIT, "active deepspeed.zero.Init"), (WITH_LIVE_CONFIG, "live HfDeepSpeedConfig of ZeRO stage 3")],
)
def test_load_under_zero_3_refuses_and_loads_after_it(model_path, tmp_path, code, found):
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, model_path, tmp_path / "store"],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, loaded = done.stdout.strip().splitlines()[-2:]
    assert found in refused
    assert "load outside of it" in refused
    assert loaded == "160"
