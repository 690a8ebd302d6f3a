"""Edits of weights that rest on disk: they stay through evictions, are counted, and never reach the file."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from chain import DEVICE_MAP, Chain
from torch import nn

import lading
from crowd import run_together
from zoo import BY_NAME, QUIET

pytestmark = QUIET


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evict_all(model: Chain, residency: lading.Residency, x: torch.Tensor) -> None:
    """Run until every block was evicted at least once."""
    for _ in range(3):
        model(x)
    assert residency.stats().evictions >= Chain.NUM_LAYERS


@torch.no_grad()
def edit_in_place(model: Chain) -> None:
    model.layers[3].weight[5:7] += 1


@torch.no_grad()
def edit_data(model: Chain) -> None:
    model.layers[3].weight.data.view(-1)[100:300].mul_(2)


def replace_data(model: Chain) -> None:
    model.layers[3].weight.data = torch.full((Chain.WIDTH, Chain.WIDTH), 0.01)


def replace_parameter(model: Chain) -> None:
    model.layers[3].weight = nn.Parameter(torch.full((Chain.WIDTH, Chain.WIDTH), 0.02), requires_grad=False)


def load_biases(model: Chain) -> None:
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if name.endswith("bias")}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("edit", [edit_in_place, edit_data, replace_data, replace_parameter, load_biases])
def test_an_edit_while_offloaded_stays_and_never_reaches_the_file(edit, mapped_chain, chain_file, x):
    plain, model = mapped_chain(), mapped_chain()
    before = digest(chain_file)
    unedited = model(x)
    edit(plain)
    expected = plain(x)
    assert not torch.equal(expected, unedited)
    residency = lading.offload(model, lading.plan(model, {"cpu": 5 * 266_240}))  # room for edits too
    with residency:
        evict_all(model, residency, x)
        edit(model)
        for _ in range(4):
            assert torch.equal(model(x), expected)
        if edit is not replace_parameter:  # what lading never saw, it cannot count
            assert residency.stats().edited_bytes > 0
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert torch.equal(model(x), expected)
    assert digest(chain_file) == before


def test_edits_of_every_block_in_turn_stay_through_evictions(mapped_chain, x):
    plain, model = mapped_chain(), mapped_chain()
    with lading.offload(model, lading.plan(model, {"cpu": 4 * 266_240})) as residency, torch.no_grad():
        for turn in range(16):
            for each in (plain, model):
                each.layers[turn % 8].bias[turn] += turn + 1
            assert torch.equal(model(x), plain(x))
        assert residency.stats().evictions > 8
        assert residency.stats().edited_bytes >= 8 * 4096


def test_edits_beyond_the_room_are_refused_and_undone_edits_are_not_lost(mapped_chain, x):
    model = mapped_chain()
    with lading.offload(model, DEVICE_MAP) as residency:
        model(x)
        with torch.no_grad():
            for layer in model.layers:
                layer.weight.mul_(2)
        fetches = residency.stats().fetches
        with pytest.raises(lading.ResidencyError) as caught:
            model(x)
        message = str(caught.value)
        assert "room for fetched weights: found" in message
        assert "edited weights hold" in message
        assert "needed at once" in message
        assert residency.stats().fetches <= fetches + 2
        with residency.editing():
            pass  # nobody is left inside
    plain = mapped_chain()
    with torch.no_grad():
        for layer in plain.layers:
            layer.weight.mul_(2)
    assert torch.equal(model(x), plain(x))


def test_editing_beside_running_forwards_loses_no_edit(mapped_chain, x):
    model = mapped_chain()
    num_edits = 60
    is_over = threading.Event()

    def forwards() -> None:
        while not is_over.is_set():
            model(x)

    with lading.offload(model, lading.plan(model, {"cpu": 5 * 266_240})) as residency:
        starts = [layer.bias.clone() for layer in model.layers]

        def edits() -> None:
            try:
                for turn in range(num_edits):
                    with residency.editing(), torch.no_grad():
                        model.layers[turn % 8].bias.add_(1)
            finally:
                is_over.set()

        assert run_together([forwards, forwards, edits]) == []
        expected = list(starts)
        for turn in range(num_edits):
            expected[turn % 8] = expected[turn % 8] + 1
        assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model.layers, expected, strict=True))


def test_a_buffer_that_forwards_write_is_not_dropped_beside_them(mapped_chain, x):
    """Buffers stand among the weights in the file: an eviction must leave their pages alone."""
    model = mapped_chain().train()
    with lading.offload(model, DEVICE_MAP), torch.no_grad():
        for _ in range(40):
            model(x)
    assert model.seen == 40


def test_editing_and_closing_inside_a_forward_are_refused(mapped_chain, x):
    model = mapped_chain()
    with lading.offload(model, DEVICE_MAP) as residency:
        raised = []

        def call(*_: object) -> None:
            with pytest.raises(lading.ResidencyError, match=r"residency.close\(\): found a forward"):
                residency.close()
            with pytest.raises(lading.ResidencyError, match=r"residency.editing\(\): found a forward"):
                residency.editing().__enter__()
            raised.append(True)

        handle = model.layers[4].register_forward_hook(call)
        model(x)
        handle.remove()
        assert raised
        with residency.editing(), pytest.raises(lading.ResidencyError, match=r"editing\(\) around it"):
            model(x)
        model(x)


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::lading.PlanWarning")
def test_adapters_are_added_merged_unmerged_and_removed_while_offloaded(saved):
    from peft import LoraConfig, get_peft_model

    architecture = BY_NAME["qwen2-tied"]
    inputs = architecture.inputs()
    inputs.pop("labels", None)

    def story(model: nn.Module) -> list[torch.Tensor]:
        seen = []
        with torch.no_grad():
            torch.manual_seed(0)
            adapted = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            ).eval()
            seen.append(adapted(**inputs).logits)
            adapted.merge_adapter()
            seen += [adapted(**inputs).logits for _ in range(3)]
            adapted.unmerge_adapter()
            seen.append(adapted(**inputs).logits)
            model = adapted.unload()
            seen += [model(**inputs).logits for _ in range(2)]
        return seen

    expected = story(lading.load(saved(architecture)))
    model = lading.load(saved(architecture))
    file = saved(architecture) / "model.safetensors"
    before = digest(file)
    with lading.offload(model, {"": "disk"}) as residency:
        found = story(model)
        assert residency.stats().fetches > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert digest(file) == before
