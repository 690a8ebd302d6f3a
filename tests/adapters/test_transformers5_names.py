"""Where a private name of transformers 5 is missing or has another form, loading takes the public path and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel, modeling_utils

import lading
from zoo import BY_NAME, QUIET, named_tensors

pytestmark = [pytest.mark.transformers5, *QUIET]


@pytest.fixture
def names():
    from lading.adapters import transformers5_names

    transformers5_names.missing_names.cache_clear()
    yield transformers5_names
    transformers5_names.missing_names.cache_clear()


def test_load_without_a_private_name_goes_through_from_pretrained_and_says_so_once(saved, names, monkeypatch, caplog):
    expected = named_tensors(BY_NAME["qwen2-tied"].build())
    monkeypatch.setattr(names, "_CALLED", (*names._CALLED, (modeling_utils, "_name_of_yesterday", ())))
    with caplog.at_level(logging.DEBUG, "lading.adapters.transformers5_names"):
        for _ in range(2):
            model, report = lading.load(saved(BY_NAME["qwen2-tied"]), output_loading_info=True)
            found = named_tensors(model)
            assert report.loader == "transformers"
            assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    told = [each.getMessage() for each in caplog.records if "_name_of_yesterday" in each.getMessage()]
    assert len(told) == 1
    assert told[0].endswith("loading goes through from_pretrained")


@pytest.mark.parametrize("lack", ["name", "parameter", "class method"])
def test_names_that_are_gone_or_take_something_else_are_missing(names, lack, monkeypatch):
    if lack == "name":
        monkeypatch.delattr(modeling_utils, "_get_dtype")
        expected = "transformers.modeling_utils._get_dtype"
    elif lack == "parameter":
        monkeypatch.setattr(modeling_utils, "_get_dtype", lambda dtype, config, state_dict, weights_only: None)
        expected = "transformers.modeling_utils._get_dtype(hf_quantizer)"
    else:
        monkeypatch.delattr(PreTrainedModel, "set_use_kernels")
        expected = "PreTrainedModel.set_use_kernels"
    assert expected in names.missing_names()


def test_load_takes_the_direct_path_where_every_name_is_there(saved, names):
    _, report = lading.load(saved(BY_NAME["qwen2-tied"]), output_loading_info=True)
    assert report.loader == ("transformers" if names.missing_names() else "lading")


def test_dtype_plan_and_contexts_are_asked_in_the_form_of_the_release(names):
    class Old:
        def __init__(self):
            self.dtype_plan = {"norm": torch.float32}

        @classmethod
        def get_init_context(cls, dtype, is_quantized, _is_ds_init_called):
            return [dtype, is_quantized, _is_ds_init_called]

    assert names.dtype_plan(Old(), torch.float16) == {"norm": torch.float32}
    assert names.init_contexts(Old, torch.float16, is_quantized=True) == [torch.float16, True, False]
    assert len(names.init_contexts(PreTrainedModel, torch.float16, is_quantized=False)) >= 2
    assert isinstance(names.dtype_plan(BY_NAME["t5"].build(), torch.float16), dict)
