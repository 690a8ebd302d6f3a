"""Prove that accelerate and transformers take `Plan.device_map` as it is and then run the model as planned.

Part of each model rests on the disk. What is compared is the output, bit for bit, with that of the same model in
memory. Accelerators are made up: accelerate then says where it would run each block, and nothing is run.

Neither can offload everything, whichever map it is given. accelerate's hooks fetch what belongs to the module that is
called: a weight that is read without a call stays on meta (`READ_WITHOUT_A_CALL`). What transformers loses where it
offloads to the disk itself says `is_lost`. Here plans keep such blocks in memory, and a test proves that each of them
alone on the disk is enough to fail; an architecture that has no such plan is skipped with these blocks named.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lading
from architectures import MAJOR, Architecture
from lading.placement.plan import Placement
from zoo import BY_NAME, EVERY, QUIET, tensors

pytestmark = [
    pytest.mark.needs("accelerate"),
    # tensors that a module holds beside its children are no modules; accelerate's own maps have such names too
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning"),
    pytest.mark.filterwarnings("ignore::lading.placement.plan.PlanWarning"),
    *QUIET,
]

SHARES = tuple(part / 40 for part in range(20, 40))
"""What the CPU may hold of a model; the first with which a plan exists is taken."""
ACCELERATORS: list[dict[int | str, float]] = [
    {0: 0.45, 1: 0.45, "cpu": 2}, {0: 0.3, 1: 0.6, "cpu": 0.3}, {0: 0.6, 1: 0.3, 2: 0.3}, {1: 0.7, "cpu": 2},
    {0: 0.1, 1: 0.7, 2: 0.1, "cpu": 2}, {0: 0.55, 1: 0.55},
]  # fmt: skip
"""Budgets as shares of a model. All but the last stream something."""

# Architecture → the blocks that accelerate never fetches in time, as a pattern of their names: some other module reads
# their weights, or asks them for their device, without calling them. The last one edits its weights while it runs.
READ_WITHOUT_A_CALL = {
    "dbrx": r"blocks\.\d+$",  # its experts' weights, in chunks
    "deberta": "rel_embeddings$",
    "deberta_v2": "rel_embeddings$",
    "detr": "query_position_embeddings$",
    "idefics3": "patch_embedding$",
    "jetmoe": r"layers\.\d+$",  # its experts' weights
    "layoutlmv3": "rel_pos(_x|_y)?_bias$",
    "mobilebert": r"word_embeddings$|predictions\.dense$",
    "perceiver": r"input_preprocessor\.embeddings$",
    "prophetnet": r"decoder\.(position|ngram)_embeddings$",
    "sam": r"no_mask_embed$|point_embed\.[01]$|iou_token$|mask_tokens$"
    + (r"|encoder\.shared_embedding$" * (MAJOR > 4)),
    "siglip": r"vision_model\.head$",  # torch.nn.MultiheadAttention
    "wavlm": r"attention\.([qkv]|out)_proj$|rel_attn_embed$",
    "rwkv": r"blocks\.1$",
} | (
    {"dac": "codebook$", "lfm2": "embed_tokens$", "qwen3_vl_moe": r"visual\.pos_embed$", "videomae": r"layer\.\d+$"}
    if MAJOR == 4
    else {}
)


def total_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each once."""
    return sum({id(each): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())


def is_read_without_a_call(architecture: Architecture, block: Placement) -> bool:
    """Say whether accelerate's hooks would never fetch a block."""
    pattern = READ_WITHOUT_A_CALL.get(architecture.name)
    return pattern is not None and any(re.search(pattern, key) for key in block.keys)


def is_lost(model: transformers.PreTrainedModel, block: Placement) -> bool:
    """Say whether `from_pretrained` loses something of a block that it is to leave on the disk.

    Both versions: a parameter that checkpoints leave out. Version 4 alone: of tied tensors all names but one, and the
    values of persistent buffers, which stay as they were initialised (indices are initialised to the same).
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    stored = [name for name, buffer in model.named_buffers() if name in state and buffer.is_floating_point()]
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()

    def holds(name: str) -> bool:
        return any(name == key or name.startswith(f"{key}.") for key in block.keys)

    if any(re.search(pattern, name) for pattern in left_out for name in tensors if holds(name)):
        return True
    return MAJOR == 4 and (len(block.keys) > 1 or any(map(holds, stored)))


def with_a_part_on_disk(architecture: Architecture, model: nn.Module, *, by_transformers: bool) -> lading.Plan:
    """Plan on a CPU that is too small, so that what can be offloaded is and what cannot be is not; or skip."""
    refused: set[str] = set()
    for share in SHARES:
        try:
            plan = lading.plan(model, {"cpu": int(total_bytes(model) * share)}, runtime="accelerate")
        except lading.PlanError:
            continue
        on_disk = [block for block in plan.placements if block.home == "disk"]
        bad = {
            block.name
            for block in on_disk
            if is_read_without_a_call(architecture, block) or (by_transformers and is_lost(model, block))
        }
        refused |= bad
        if on_disk and not bad:
            return plan
    assert refused, "no plan leaves anything on the disk"
    return pytest.skip(f"every plan leaves {sorted(refused)} on the disk, which this runtime cannot")


def outputs(architecture: Architecture, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of one call's outputs."""
    with torch.no_grad():
        return dict(tensors(architecture.run(model)))


def is_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    """Say whether all outputs are there with the same bits, NaN for NaN."""
    return expected.keys() == found.keys() and all(
        torch.allclose(found[name], each, rtol=0, atol=0, equal_nan=True) for name, each in expected.items()
    )


# -- where accelerate would run things


class SeenError(Exception):
    """Accelerate has said where each module runs; nothing more is needed."""


def run_places(model: nn.Module, device_map: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ask `dispatch_model` where it would run each module; '' for what the map does not name."""
    import accelerate

    found: dict[str, Any] = {}

    def note(_: nn.Module, *, execution_device: dict[str, Any], **_rest: Any) -> None:
        found.update(execution_device)
        raise SeenError

    with monkeypatch.context() as patch:
        patch.setattr(accelerate.big_modeling, "attach_align_device_hook_on_blocks", note)
        with pytest.raises(SeenError):
            accelerate.dispatch_model(model, device_map, offload_index={}, force_hooks=True)
    return found


def place_of(places: dict[str, Any], name: str) -> Any:
    """Find the place of the module that holds a name."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]


@pytest.mark.parametrize("shares", ACCELERATORS, ids=str)
@pytest.mark.parametrize("architecture", EVERY)
def test_accelerate_runs_every_block_where_the_plan_says(
    architecture: Architecture, shares: dict[int | str, float], monkeypatch: pytest.MonkeyPatch
):
    from accelerate.utils.modeling import check_device_map

    model = architecture.build()
    total = total_bytes(model)
    try:
        plan = lading.plan(
            model, {device: int(total * share) for device, share in shares.items()}, runtime="accelerate"
        )
    except lading.PlanError:
        assert "cpu" not in shares or shares["cpu"] < 1, "the CPU alone could hold it"
        return
    check_device_map(model, plan.device_map)
    assert set(plan.device_map.values()) <= {*shares, "cpu", "disk"}
    places = run_places(model, plan.device_map, monkeypatch)
    if plan.resident_bytes < plan.total_bytes:
        assert places[""] == plan.main_device
    for block in plan.placements:
        for key in block.keys:
            assert place_of(places, key) == block.execution_device, key


# -- a part on the disk


@pytest.mark.parametrize("architecture", EVERY)
def test_dispatch_model_takes_the_map_and_gives_the_same_bits(architecture: Architecture, tmp_path: Path):
    from accelerate import dispatch_model
    from accelerate.utils.modeling import check_device_map

    model = architecture.build()
    expected = outputs(architecture, model)
    model = architecture.build()
    plan = with_a_part_on_disk(architecture, model, by_transformers=False)
    check_device_map(model, plan.device_map)
    dispatched = dispatch_model(model, plan.device_map, offload_dir=tmp_path)
    assert dispatched.hf_device_map == plan.device_map
    assert any(parameter.is_meta for parameter in model.parameters())
    assert is_equal(expected, outputs(architecture, dispatched))


@pytest.mark.parametrize("architecture", EVERY)
def test_from_pretrained_takes_the_map_and_gives_the_same_bits(architecture: Architecture, tmp_path: Path):
    architecture.build().save_pretrained(tmp_path / "model")
    whole = architecture.resolve().from_pretrained(tmp_path / "model", dtype="auto")
    expected = outputs(architecture, whole)
    plan = with_a_part_on_disk(architecture, whole, by_transformers=True)
    model = architecture.resolve().from_pretrained(
        tmp_path / "model", dtype="auto", device_map=plan.device_map, offload_folder=tmp_path / "offloaded"
    )
    assert model.hf_device_map == plan.device_map
    assert any(parameter.is_meta for parameter in model.parameters())
    assert is_equal(expected, outputs(architecture, model))


# -- what neither can, whichever map


def one_on_disk(model: nn.Module, block: Placement) -> dict[str, str]:
    """Return a map with one block on the disk and all others in memory."""
    plan = lading.plan(model, {"cpu": total_bytes(model)}, runtime="accelerate")
    return {key: "disk" if key in block.keys else "cpu" for each in plan.placements for key in each.keys}


def blocks_on_cpu(model: nn.Module) -> tuple[Placement, ...]:
    """Return the blocks of a model."""
    return lading.plan(model, {"cpu": total_bytes(model)}, runtime="accelerate").placements


def fails(architecture: Architecture, expected: dict[str, torch.Tensor], model: nn.Module) -> bool:
    """Say whether a call raises or gives other bits: on the CPU a linear layer on meta weights raises nothing."""
    try:
        return not is_equal(expected, outputs(architecture, model))
    except (RuntimeError, NotImplementedError, KeyError, ValueError):
        return True


@pytest.mark.parametrize("name", [name for name in READ_WITHOUT_A_CALL if name in BY_NAME])
def test_accelerate_cannot_offload_what_is_read_without_a_call(name: str, tmp_path: Path):
    from accelerate import dispatch_model

    architecture = BY_NAME[name]
    expected = outputs(architecture, architecture.build())
    tried = [each for each in blocks_on_cpu(architecture.build()) if is_read_without_a_call(architecture, each)]
    assert tried
    for index, block in enumerate(tried):
        model = architecture.build()
        dispatch_model(model, one_on_disk(model, block), offload_dir=tmp_path / str(index))
        assert fails(architecture, expected, model), f"{block.name} can be offloaded: take it out of the table"


LOST = {"marian": "a table of sines that no checkpoint holds"}
if MAJOR == 4:
    LOST |= {"gpt2": "the second name of a tied weight", "resnet": "the statistics of batch norms"}


@pytest.mark.parametrize("name", LOST)
def test_from_pretrained_cannot_leave_on_the_disk_what_it_loses(name: str, tmp_path: Path):
    architecture = BY_NAME[name]
    architecture.build().save_pretrained(tmp_path / "model")
    whole = architecture.resolve().from_pretrained(tmp_path / "model", dtype="auto")
    expected = outputs(architecture, whole)
    tried = [each for each in blocks_on_cpu(whole) if is_lost(whole, each)]
    assert tried
    for index, block in enumerate(tried):
        model = architecture.resolve().from_pretrained(
            tmp_path / "model",
            dtype="auto",
            device_map=one_on_disk(whole, block),
            offload_folder=tmp_path / str(index),
        )
        assert fails(architecture, expected, model), f"{block.name} can be offloaded now"
