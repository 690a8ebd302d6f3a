"""Cut modules into blocks: every tensor in exactly one, what is shared counted once, what is used together kept so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recount import all_tensors, covering_key, units_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from trees import Node, trees

import lading
from lading.placement.blocks import Block, BlockRules, blocks_of, declared_whole, in_order
from lading.placement.ties import declared_ties
from models import NETS, build

PLAIN = BlockRules()


def cut(module: nn.Module, *no_split: str, **rules: object) -> dict[str, Block]:
    """Give the blocks of a module by name."""
    blocks = blocks_of(module, BlockRules(no_split_classes=frozenset(no_split), **rules))
    return {block.name: block for block in blocks}


def owner_of(name: str, blocks: tuple[Block, ...] | dict[str, Block]) -> Block:
    """Find the only block that holds a tensor."""
    listed = blocks.values() if isinstance(blocks, dict) else blocks
    owners = [block for block in listed if covering_key(name, block.keys) is not None]
    assert len(owners) == 1, f"{name} is in {[block.keys for block in owners]}"
    return owners[0]


def unique_bytes(module: nn.Module) -> int:
    """Count every tensor object once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in all_tensors(module).values()}.values())


class Numbers(nn.Module):
    """Register tensors under the names given."""

    def __init__(self, **tensors: torch.Tensor | nn.Module | None) -> None:
        super().__init__()
        for name, value in tensors.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter) or value is None:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self) -> None:
        """Exist, so that this is no mere container."""


# Coverage


@given(trees(depth=3), st.sampled_from([(), ("Whole",), ("Whole", "Sequential"), ("Node",), ("Linear",)]))
def test_blocks_random_tree_holds_every_tensor_in_exactly_one_block(module, no_split):
    blocks = blocks_of(module, BlockRules(no_split_classes=frozenset(no_split)))
    keys = [key for block in blocks for key in block.keys]
    tensors = all_tensors(module)

    assert len(keys) == len(set(keys))
    for name in tensors:
        owner_of(name, blocks)
        assert sum(covering_key(name, [key]) is not None for key in keys) == 1, name
    for key in keys:
        assert any(covering_key(name, [key]) is not None for name in tensors), f"{key} holds nothing"
    assert all(block.name == block.keys[0] for block in blocks)


@given(trees(depth=3), st.sampled_from([(), ("Whole",), ("Whole", "Sequential"), ("Node",), ("Linear",)]))
def test_blocks_random_tree_weighs_what_an_independent_count_finds(module, no_split):
    blocks = blocks_of(module, BlockRules(no_split_classes=frozenset(no_split)))
    units = units_of(module, no_split)

    assert sum(block.total_bytes for block in blocks) == unique_bytes(module)
    assert len(blocks) == len(units)
    for block, unit in zip(blocks, units, strict=True):
        assert all(owner_of(name, blocks) is block for name in unit.names)
        assert block.total_bytes == unit.total_bytes
        assert block.is_lookup == unit.is_table
        if not any(len({id(all_tensors(module)[n]) for n in unit.names}) < len(unit.names) for _ in (0,)):
            assert (block.weight_bytes, block.buffer_bytes, block.pinned_bytes) == (
                unit.weight_bytes,
                unit.buffer_bytes,
                unit.own_bytes,
            )


@pytest.mark.parametrize("net_class", NETS, ids=lambda net: net.__name__)
def test_blocks_unusual_net_is_covered_and_counted(net_class):
    net = build(net_class)
    blocks = blocks_of(net, PLAIN)

    assert {owner_of(name, blocks).name for name in all_tensors(net)} == {block.name for block in blocks}
    storages = {t.data_ptr() or id(t): 0 for t in all_tensors(net).values()}
    for tensor in all_tensors(net).values():
        key = tensor.data_ptr() or id(tensor)
        storages[key] = max(storages[key], tensor.nbytes)
    assert sum(block.total_bytes for block in blocks) == sum(storages.values())


@pytest.mark.parametrize("net_class", NETS, ids=lambda net: net.__name__)
def test_blocks_on_meta_are_those_of_the_real_module(net_class):
    with torch.device("meta"):
        net = net_class()

    assert blocks_of(net, PLAIN) == blocks_of(net_class(), PLAIN)


def test_blocks_module_without_tensors_has_none():
    assert cut(nn.ReLU()) == {}
    assert cut(nn.Sequential(nn.ReLU(), nn.Sequential())) == {}


def test_blocks_module_that_is_one_leaf_is_the_empty_name():
    assert cut(nn.Linear(2, 3)) == {"": Block("", ("",), 36, 0, 0, False, "Linear")}


def test_blocks_order_is_that_of_registration_with_own_tensors_first():
    net = Numbers(second=nn.Linear(1, 1), own=nn.Parameter(torch.zeros(3)), first=nn.Linear(1, 1))

    assert list(cut(net)) == ["own", "second", "first"]


def test_blocks_none_entries_are_no_tensors():
    net = Numbers(inner=nn.Linear(2, 2, bias=False), absent=None)
    net.register_buffer("no_buffer", None)
    net.register_module("no_module", None)

    assert cut(net) == {"inner": Block("inner", ("inner",), 16, 0, 0, False, "Linear")}


# What moves whole


def test_blocks_own_tensors_of_a_split_module_are_pinned():
    net = Numbers(
        scale=nn.Parameter(torch.zeros(3)), mask=torch.zeros(5, dtype=torch.bool), inner=nn.Linear(2, 2, bias=False)
    )

    assert cut(net)["scale"] == Block("scale", ("scale", "mask"), 0, 0, 17, False, "Numbers")


@pytest.mark.parametrize("container", [nn.ParameterList, nn.ParameterDict])
def test_blocks_container_of_parameters_is_pinned(container):
    """It is never called: no forward of its own tells when its tensors are needed."""
    tensors = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    held = container(tensors) if container is nn.ParameterList else container(dict(zip("ab", tensors, strict=True)))
    net = Numbers(held=held, inner=nn.Linear(2, 2, bias=False))
    block = owner_of("held.0" if container is nn.ParameterList else "held.a", cut(net))

    assert (block.weight_bytes, block.pinned_bytes) == (0, 32)


def test_blocks_class_not_to_be_split_is_one_with_all_it_holds():
    net = Numbers(layer=Numbers(own=torch.zeros(2), a=nn.Linear(2, 2), b=nn.BatchNorm1d(2)), head=nn.Linear(2, 2))

    assert list(cut(net)) == ["layer.own", "layer.a", "layer.b", "head"]
    inner = Node()
    inner.add_module("layer", net.layer)
    assert cut(inner, "Numbers") == {"layer": Block("layer", ("layer",), 24 + 16, 8 + 24, 0, False, "Numbers")}


def test_blocks_class_not_to_be_split_inside_another_is_part_of_it():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

    assert list(cut(net, "Linear")) == ["0.0", "0.1"]
    assert list(cut(net, "Sequential", "Linear")) == [""]


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.LSTM(4, 4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_blocks_module_that_reads_its_childrens_weights_is_one_block(module):
    net = nn.Sequential(nn.Linear(2, 2), module)
    blocks = cut(net)

    assert list(blocks) == ["0", "1"]
    assert blocks["1"].weight_bytes + blocks["1"].buffer_bytes == unique_bytes(module)


def test_blocks_subclass_of_attention_is_one_block_too():
    class Mine(nn.MultiheadAttention):
        pass

    assert list(cut(nn.Sequential(Mine(4, 2)))) == ["0"]


def test_blocks_old_weight_norm_is_one_block():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net[0])

    assert cut(net)["0"].weight_bytes == 4 * (2 * 2 + 2 + 2)


def test_blocks_parametrised_embedding_inside_a_model_is_one_block():
    net = Numbers(table=nn.Embedding(3, 2), head=nn.Linear(2, 2))
    parametrize.register_parametrization(net.table, "weight", nn.Identity())

    block = cut(net)["table"]
    assert (block.keys, block.weight_bytes, block.is_lookup) == (("table",), 24, False)


# Bytes


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_blocks_bool_buffer_is_a_byte_for_each_element(size):
    assert cut(Numbers(mask=torch.zeros(size, dtype=torch.bool)))[""].buffer_bytes == size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_blocks_dtype_wider_or_narrower_casts_floats_that_are_loaded(dtype):
    net = Numbers(
        weight=nn.Parameter(torch.zeros(10)),
        codes=nn.Parameter(torch.zeros(10, dtype=torch.int8), requires_grad=False),
        small=nn.Parameter(torch.zeros(10, dtype=torch.float8_e4m3fn), requires_grad=False),
        mean=torch.zeros(10),
        count=torch.zeros(1, dtype=torch.int64),
    )
    net.register_buffer("frequencies", torch.zeros(10), persistent=False)
    block = cut(net, dtype=dtype)[""]

    assert block.weight_bytes == 10 * dtype.itemsize + 10 + 10
    assert block.buffer_bytes == 10 * dtype.itemsize + 8 + 40


def test_blocks_special_dtypes_come_before_the_general_one():
    net = Numbers(a=nn.Linear(10, 1, bias=False), b=nn.Linear(10, 1, bias=False))
    blocks = cut(net, dtype=torch.bfloat16, special_dtypes={"a.weight": torch.float32, "b.weight": torch.int8})

    assert (blocks["a"].weight_bytes, blocks["b"].weight_bytes) == (40, 10)


def test_blocks_special_bytes_come_before_everything():
    net = Numbers(a=nn.Linear(10, 1, bias=False))
    blocks = cut(net, special_dtypes={"a.weight": torch.float32}, special_bytes={"a.weight": 7})

    assert blocks["a"].weight_bytes == 7


def test_blocks_empty_tensors_weigh_nothing_and_are_not_tied():
    net = Numbers(a=Numbers(none=nn.Parameter(torch.zeros(0))), b=Numbers(none=nn.Parameter(torch.zeros(0))))

    assert [block.total_bytes for block in cut(net).values()] == [0, 0]


@given(trees(), st.sampled_from([torch.float64, torch.bfloat16]))
def test_blocks_random_tree_in_another_dtype_weighs_what_it_does_after_the_cast(module, dtype):
    """Buffers that are not stored keep their dtype; everything else that floats takes the new one."""
    blocks = blocks_of(module, BlockRules(dtype=dtype))
    total = 0
    unsaved = {id(each._buffers[n]) for each in module.modules() for n in each._non_persistent_buffers_set}
    for tensor in {id(t): t for t in all_tensors(module).values()}.values():
        is_cast = tensor.is_floating_point() and id(tensor) not in unsaved
        total += tensor.numel() * (dtype.itemsize if is_cast else tensor.element_size())

    assert sum(block.total_bytes for block in blocks) == total


# Ties


def test_blocks_tied_by_identity_are_one_counted_once():
    table, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = table.weight
    blocks = cut(Numbers(table=table, middle=nn.Linear(4, 4, bias=False), head=head))

    assert list(blocks) == ["table", "middle"]
    assert blocks["table"].keys == ("table", "head")
    assert blocks["table"].weight_bytes == 128
    assert not blocks["table"].is_lookup, "a table that somebody multiplies with is fetched whole"


def test_blocks_tied_by_storage_are_one_counted_once():
    """Two parameter objects over the same bytes, one of them transposed."""
    first = nn.Linear(4, 8, bias=False)
    second = nn.Linear(8, 4, bias=False)
    second.weight = nn.Parameter(first.weight.detach().t())
    blocks = cut(nn.Sequential(first, second))

    assert list(blocks) == ["0"]
    assert blocks["0"].keys == ("0", "1")
    assert blocks["0"].weight_bytes == 128


@pytest.mark.parametrize("is_small_first", [True, False])
def test_blocks_view_of_the_first_rows_counts_the_whole_once(is_small_first):
    whole = torch.zeros(8, 4)
    views = [nn.Parameter(whole[:2]), nn.Parameter(whole)]
    net = nn.Sequential(*(Numbers(weight=view) for view in (views if is_small_first else views[::-1])))

    assert [block.weight_bytes for block in cut(net).values()] == [128]


def test_blocks_view_of_the_last_rows_counts_the_whole_once():
    whole = torch.zeros(8, 4)
    net = nn.Sequential(Numbers(weight=nn.Parameter(whole)), Numbers(weight=nn.Parameter(whole[2:])))

    assert [block.weight_bytes for block in cut(net).values()] == [128]


def test_blocks_slices_of_one_storage_that_do_not_overlap_are_apart():
    """So do a checkpoint's tensors lie in one mapping: neighbours in memory are not tied."""
    flat = torch.zeros(12)
    net = nn.Sequential(*(Numbers(weight=nn.Parameter(part)) for part in flat.split(4)))

    assert [block.weight_bytes for block in cut(net).values()] == [16, 16, 16]


def test_blocks_shared_module_is_one_under_both_names():
    shared = nn.Linear(2, 2, bias=False)
    blocks = cut(nn.Sequential(shared, nn.Linear(1, 1), shared))

    assert list(blocks) == ["0", "1"]
    assert blocks["0"].keys == ("0", "2")
    assert blocks["0"].weight_bytes == 16


def test_blocks_shared_module_with_children_keeps_each_of_them_together():
    shared = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(3, 3, bias=False))
    blocks = cut(nn.Sequential(shared, shared))

    assert [block.keys for block in blocks.values()] == [("0.0", "1.0"), ("0.1", "1.1")]
    assert [block.weight_bytes for block in blocks.values()] == [16, 36]


def test_blocks_tie_inside_one_block_is_counted_once():
    layer = Numbers(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    layer.b.weight = layer.a.weight
    net = Node()
    net.add_module("layer", layer)

    assert cut(net, "Numbers")["layer"].weight_bytes == 64


def test_blocks_module_tied_twice_is_counted_once():
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    b.weight, c.weight, c.bias = a.weight, a.weight, b.bias
    blocks = cut(nn.Sequential(a, b, c))

    assert [block.keys for block in blocks.values()] == [("0", "1", "2")]
    assert blocks["0"].weight_bytes == 64 + 16 + 16


def test_blocks_two_chains_of_ties_meet_in_one_block():
    a, b, c, d = (nn.Linear(4, 4) for _ in range(4))
    b.weight, d.weight, c.bias = a.weight, c.weight, b.bias

    assert [block.keys for block in cut(nn.Sequential(a, b, c, d)).values()] == [("0", "1", "2", "3")]


def test_blocks_names_of_which_one_begins_the_other_are_apart():
    net = Numbers(**{f"layer{i}": nn.Linear(1, i) for i in (1, 10, 100)})
    tied = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(12)))
    tied[10].weight = tied[0].weight

    assert list(cut(net)) == ["layer1", "layer10", "layer100"]
    blocks = cut(tied)
    assert blocks["0"].keys == ("0", "10")
    assert blocks["1"].keys == ("1",)
    assert [blocks[str(i)].weight_bytes for i in (0, 1, 11)] == [4, 4, 4]


def test_blocks_own_tensor_tied_to_a_childs_rests_with_it():
    """As BERT's head does: a bias of its own that its decoder shows too."""
    head = Numbers(bias=nn.Parameter(torch.zeros(8)), decoder=nn.Linear(4, 8))
    head.decoder.bias = head.bias
    blocks = cut(head)

    assert list(blocks) == ["bias"]
    assert blocks["bias"].keys == ("bias", "decoder")
    assert blocks["bias"].total_bytes == 4 * 8 * 4 + 32


def test_blocks_own_tensor_tied_to_a_childs_stays_where_the_model_runs():
    """No forward of its own tells when the parent reads it, so what it shares is not streamed under it either."""
    net = Numbers(gain=nn.Parameter(torch.zeros(4)), norm=nn.LayerNorm(4), head=nn.Linear(4, 4))
    net.norm.weight = net.gain
    block = cut(net)["gain"]

    assert block.keys == ("gain", "norm")
    assert (block.weight_bytes, block.pinned_bytes) == (16, 16)


def test_blocks_tied_modules_are_fetched_one_at_a_time():
    """A table and a head of their own sizes share a tensor: the room is that of the larger module."""
    table, head = nn.Embedding(8, 4), nn.Linear(4, 8)
    head.weight = table.weight

    assert cut(nn.Sequential(table, head))["0"].fetch_bytes == 128 + 32
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    b.weight, c.bias = a.weight, b.bias
    assert cut(nn.Sequential(a, b, c))["0"].fetch_bytes == 64 + 16


@given(trees())
def test_blocks_random_tree_keeps_what_shares_a_tensor_together(module):
    blocks = blocks_of(module, PLAIN)
    owners: dict[int, Block] = {}
    for name, tensor in all_tensors(module).items():
        assert owners.setdefault(id(tensor), owner_of(name, blocks)) is owner_of(name, blocks)


# Ties that are only declared


class Declared(nn.Module):
    """Say what is tied and tie nothing, as a transformers model between its constructor and `tie_weights`."""

    def __init__(self, ties: object, *, is_wanted: bool | None = True, device: str = "meta") -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4, device=device)
        self.layer = nn.Linear(4, 4, bias=False, device=device)
        self.lm_head = nn.Linear(4, 8, bias=False, device=device)
        self._tied_weights_keys = ties
        self.config = SimpleNamespace(tie_word_embeddings=is_wanted)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


FORMS = {
    "list": ["lm_head.weight"],
    "pattern list": [r"lm_head\.weight"],
    "dict": {"lm_head.weight": "embed.weight"},
    "pattern dict": {r"lm_head\.(weight|none)": "embed.weight"},
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_declared_tie_is_one_block_counted_once(form, device):
    blocks = cut(Declared(FORMS[form], device=device))

    assert list(blocks) == ["embed", "layer"]
    assert blocks["embed"].keys == ("embed", "lm_head")
    assert blocks["embed"].weight_bytes == 128
    assert not blocks["embed"].is_lookup


@pytest.mark.parametrize("form", FORMS)
def test_blocks_declared_tie_that_is_not_wanted_is_none(form):
    assert list(cut(Declared(FORMS[form], is_wanted=False))) == ["embed", "layer", "lm_head"]


@pytest.mark.parametrize("form", FORMS)
def test_blocks_declared_tie_that_is_tied_already_is_counted_once(form):
    net = Declared(FORMS[form])
    net.lm_head.weight = net.embed.weight

    assert sum(block.total_bytes for block in cut(net).values()) == 128 + 64


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_blocks_declaration_of_nothing_ties_nothing(nothing):
    assert len(cut(Declared(nothing))) == 3


def test_blocks_declared_tie_of_names_that_do_not_exist_ties_nothing():
    assert len(cut(Declared({"no.weight": "embed.weight", "lm_head.weight": "none.weight"}))) == 3
    assert len(cut(Declared(["no.weight"]))) == 3


def test_blocks_declared_tie_of_other_shapes_ties_nothing():
    assert len(cut(Declared({"layer.weight": "embed.weight"}))) == 3


def test_blocks_declared_chain_ends_in_one_block():
    net = Declared({"a.weight": "lm_head.weight", "lm_head.weight": "embed.weight"})
    net.add_module("a", nn.Linear(4, 8, bias=False, device="meta"))

    assert cut(net)["embed"].keys == ("embed", "lm_head", "a")


def test_blocks_expanded_ties_of_a_whole_model_are_believed():
    net = Declared(None)
    net.all_tied_weights_keys = {"lm_head.weight": "embed.weight"}

    assert cut(net)["embed"].keys == ("embed", "lm_head")


# Tables


@pytest.mark.parametrize(
    ("table", "is_lookup"),
    [
        (nn.Embedding(8, 4), True),
        (nn.Embedding(8, 4, max_norm=1.0), False),
        (nn.EmbeddingBag(8, 4), False),
        (nn.Linear(8, 4), False),
    ],
)
def test_blocks_only_a_plain_table_is_looked_up(table, is_lookup):
    assert cut(nn.Sequential(table, nn.Linear(4, 4)))["0"].is_lookup is is_lookup


def test_blocks_table_inside_a_block_is_fetched_with_it():
    net = nn.Sequential(Numbers(table=nn.Embedding(8, 4)))

    assert cut(net, "Numbers")["0"].is_lookup is False


# Order


def test_in_order_follows_the_first_calls_and_leaves_the_rest_where_it_stood():
    net = Numbers(own=nn.Parameter(torch.zeros(1)), a=nn.Linear(1, 1), b=nn.Linear(1, 1), c=nn.Linear(1, 1))
    ordered = in_order(blocks_of(net, PLAIN), ["", "c", "a"])

    assert [block.name for block in ordered] == ["own", "c", "a", "b"]
    assert set(ordered) == set(blocks_of(net, PLAIN))


def test_in_order_of_tied_blocks_is_their_first_call():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    b.weight = a.weight
    net = nn.Sequential(a, nn.Linear(1, 1), b)

    assert [block.name for block in in_order(blocks_of(net, PLAIN), ["2", "1", "0"])] == ["0", "1"]


# Quantised


@pytest.mark.needs("bitsandbytes")
def test_blocks_eight_bit_linear_counts_its_row_scales():
    import bitsandbytes

    plain = nn.Linear(64, 32)
    quantised = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    quantised.load_state_dict(plain.state_dict())
    net = nn.Sequential(quantised.to("cpu"), nn.Linear(2, 2))

    assert net[0].weight.dtype is torch.int8
    assert cut(net, dtype=torch.bfloat16)["0"].weight_bytes == 64 * 32 + 32 * 4 + 32 * 2


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("is_nested", [True, False])
def test_blocks_four_bit_linear_counts_its_whole_state(is_nested):
    import bitsandbytes

    plain = nn.Linear(64, 32)
    quantised = bitsandbytes.nn.Linear4bit(64, 32, compress_statistics=is_nested, quant_type="nf4")
    quantised.load_state_dict(plain.state_dict())
    quantised = quantised.to("cpu")
    stored = quantised.state_dict()
    tensors = [name for name in stored if "bitsandbytes__" not in name]  # the last is a JSON note about the others
    state = sum(stored[name].nbytes for name in tensors)
    offset = 4 if is_nested else 0  # kept beside the nested scales, in the note on disk

    assert quantised.weight.dtype is torch.uint8
    assert cut(nn.Sequential(quantised))["0"].weight_bytes == state + offset


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_scales_that_bitsandbytes_renames_are_refused_not_counted_as_none(kind, monkeypatch):
    import bitsandbytes

    if kind == "8 bit":
        quantised = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    else:
        quantised = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    quantised.load_state_dict(nn.Linear(64, 32).state_dict())
    quantised.to("cpu")
    blocks_of(quantised, BlockRules())
    monkeypatch.setattr("lading.placement.blocks._SCALES", ("scales_of_tomorrow",))
    with pytest.raises(
        lading.PlanError, match=r"a (Int8Params|Params4bit) of .* found a quantised weight without scal"
    ):
        blocks_of(quantised, BlockRules())


@pytest.mark.parametrize("name", ["_tied_weights_keys", "_no_split_modules"])
def test_a_declaration_that_transformers_renames_is_refused_not_taken_for_none(name, monkeypatch):
    import transformers

    base = type("PreTrainedModel", (nn.Module,), {"__module__": "transformers.modeling_utils"})
    monkeypatch.setattr(base, "_tied_weights_keys", None, raising=False)
    monkeypatch.setattr(base, "_no_split_modules", None, raising=False)
    model = type("Model", (base,), {})()
    assert hasattr(transformers.PreTrainedModel, name)
    ask = declared_ties if name == "_tied_weights_keys" else declared_whole
    assert not ask(model)
    monkeypatch.delattr(base, name)
    with pytest.raises(lading.PlanError, match=rf"Model: found no attribute '{name}' · expected one.*install"):
        ask(model)
    assert not ask(nn.Linear(2, 2))
