"""Transformers' flags with a handle: what transformers gives one thread alone, and nothing left."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import re
import weakref

import pytest
import torch
from flagged import (
    ATTENTIONS,
    HIDDEN,
    MARKS,
    ROUTER,
    ROWS,
    attributes,
    build,
    decorated,
    hooks,
    llama,
    outcome,
    same,
    states,
)
from torch import nn

import lading
from architectures import MAJOR
from lading.adapters.transformers import thread_safe_outputs
from lading.adapters.transformers_releases import rules
from zoo import BY_NAME, EVERY

pytestmark = MARKS
ASKED = [
    {HIDDEN: True},
    {ATTENTIONS: True},
    {ROUTER: True, HIDDEN: False},
    {HIDDEN: True, ATTENTIONS: True, "return_dict": False},
    *([{HIDDEN: [0, -1]}, {HIDDEN: 1, ATTENTIONS: True}] if MAJOR >= 5 else []),
]
SETTINGS = [{HIDDEN: True, ATTENTIONS: True}, {ROUTER: True, HIDDEN: True, "return_dict": False}]
UNTOLD = {(4, "internvl")}
"""Has a model inside whose forward takes no flag, and so cannot be told that its configuration's is seen to."""


# The same as transformers


@pytest.mark.parametrize("architecture", EVERY)
def test_flags_give_what_transformers_gives_one_thread(architecture):
    served = build(architecture)
    with thread_safe_outputs(served):
        assert bool(hooks(served)) == bool(decorated(served))  # what collects by itself is left alone
        for flags in ASKED if decorated(served) else ():
            expected = outcome(architecture, build(architecture), **flags)  # a new one: its hooks can stand twice
            assert same(expected, outcome(architecture, served, **flags)), flags
    assert hooks(served) == 0


@pytest.mark.parametrize("architecture", EVERY)
def test_flags_in_the_configuration_give_the_same(architecture):
    for settings in SETTINGS:
        served = build(architecture, **settings)
        if not decorated(served):
            return
        expected = outcome(architecture, build(architecture, **settings))
        with thread_safe_outputs(served):
            found = outcome(architecture, served)
        if (MAJOR, architecture.name) in UNTOLD:
            assert re.search("in the configuration of InternVLVisionModel: found a forward that does not", found[1])
        else:
            assert same(expected, found), settings


POSITIONS = rules().positions


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral"])
def test_positions_of_hidden_states_leave_none_in_place_of_the_others(name):
    model, rows = llama(name), ROWS[0]
    every = states(model, rows).hidden_states
    last = len(every) - 1
    with thread_safe_outputs(model):
        some = states(model, rows, output_hidden_states=[1, -1, 99]).hidden_states
        first = states(model, rows, output_hidden_states=-len(every)).hidden_states
    of_some, of_first = {
        "any": ([1, last], [0]),
        "states": ([1, last], [0]),
        "layers": ([1], range(len(every))),  # counted from the first layer's output, and from the front alone
        "flag": (range(len(every)), range(len(every))),
    }[POSITIONS]
    assert len(first) == len(every)
    assert len(some) == len(every) - (POSITIONS == "layers")
    assert [index for index, each in enumerate(some) if each is not None] == list(of_some)
    assert [index for index, each in enumerate(first) if each is not None] == list(of_first)
    assert same(some[-1], every[-1])
    assert same(some[1], every[2 if POSITIONS == "layers" else 1])


@pytest.mark.transformers5
@pytest.mark.parametrize("value", [[0], [1, -1, 99], (1,), {0, 2}, [], 1, -1, 0], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_a_list_or_a_number_means_what_it_means_to_the_installed_transformers(name, value):
    expected = states(llama(name), ROWS[0], output_hidden_states=value)
    model = llama(name)
    with thread_safe_outputs(model):
        assert same(expected, states(model, ROWS[0], output_hidden_states=value))


def test_generation_returns_the_states_of_every_step():
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, HIDDEN: True}
    expected = llama().generate(ROWS[0], **settings)
    model = llama()
    with thread_safe_outputs(model):
        found = model.generate(ROWS[0], **settings)
    assert len(found.hidden_states) == 4
    assert same(expected.hidden_states, found.hidden_states)


def test_gradient_checkpointing_records_each_layer_once_and_gives_the_same_gradients():
    gradients = []
    for is_served in (False, True):
        model = llama().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        handle = thread_safe_outputs(model) if is_served else None
        output = model(input_ids=ROWS[0], output_hidden_states=True, use_cache=False)
        count = len(output.hidden_states)
        sum(each.square().mean() for each in output.hidden_states).backward()
        assert len(output.hidden_states) == count == len(model.model.layers) + 1
        gradients.append([each.grad for each in model.parameters()])
        if handle is not None:
            handle.close()
    assert same(*gradients)


def test_a_checkpointed_graph_keeps_nothing_that_was_recorded():
    model = build(BY_NAME["qwen3"]).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with thread_safe_outputs(model):
        output = model(input_ids=ROWS[0], output_attentions=True, use_cache=False)
        loss, weights = output.logits.sum(), [weakref.ref(each) for each in output.attentions]
        del output
        gc.collect()
        assert [each() for each in weights] == [None] * len(model.model.layers)
        loss.backward()


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_whole_call_that_is_checkpointed_has_its_states_again_in_backward(is_reentrant):
    model = llama()

    def last(inputs):
        return model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False).hidden_states[1]

    inputs = torch.randn(2, 5, 32, requires_grad=True)
    with thread_safe_outputs(model):
        torch.utils.checkpoint.checkpoint(last, inputs, use_reentrant=is_reentrant).sum().backward()
    assert inputs.grad is not None


def test_an_offloaded_model_gives_the_same():
    model = llama()
    expected = states(model, ROWS[0]).hidden_states
    with lading.offload(model, dict.fromkeys(["model", "lm_head"], "cpu")), thread_safe_outputs(model):
        assert same(expected, states(model, ROWS[0]).hidden_states)
    with thread_safe_outputs(model), lading.offload(model, {"": "disk"}):
        assert same(expected, states(model, ROWS[0]).hidden_states)


def test_replaced_layers_are_heard():
    model, other = llama(), llama()
    with thread_safe_outputs(model):
        states(model, ROWS[0])
        model.model.layers[1] = other.model.layers[0]
        found = states(model, ROWS[0]).hidden_states
        assert hooks(model) > 0
    other.model.layers[1] = other.model.layers[0]
    assert same(states(other, ROWS[0]).hidden_states[:2], found[:2])
    assert len(found) == 3
    assert hooks(model) == 0


# Nothing kept, nothing left


@pytest.mark.parametrize("name", ["qwen3", "t5", "clip", "gemma2"])
def test_closing_leaves_every_module_as_it_was(name):
    model = build(BY_NAME[name])
    before = attributes(model)
    handle = thread_safe_outputs(model)
    outcome(BY_NAME[name], model, **{HIDDEN: True, ATTENTIONS: True})
    handle.close()
    handle.close()
    assert attributes(model) == before
    with thread_safe_outputs(model) as again:
        assert again is not handle
    assert attributes(model) == before


def failure(error: type[BaseException]):
    def fail(*_):
        raise error("broken")

    return fail


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "t5", "clip"])
def test_after_an_exception_in_any_module_the_next_call_is_right(name, error):
    architecture = BY_NAME[name]
    model = build(architecture)
    expected = outcome(architecture, build(architecture), **{HIDDEN: True})
    with thread_safe_outputs(model) as handle:
        for module in [each for each in model.modules() if each is not model]:
            failing = module.register_forward_pre_hook(failure(error))
            with contextlib.suppress(KeyboardInterrupt):
                outcome(architecture, model, **{HIDDEN: True})
            failing.remove()
            assert len(handle._running) == 0
            assert same(expected, outcome(architecture, model, **{HIDDEN: True}))
            assert outcome(architecture, model).get("hidden_states") is None


def test_after_an_interrupt_layers_called_alone_keep_nothing():
    model = llama()
    layer, made = model.model.layers[0], []
    with thread_safe_outputs(model):
        failing = model.model.layers[1].register_forward_pre_hook(failure(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            states(model, ROWS[0])
        failing.remove()
        for norm in (layer.input_layernorm, layer.mlp, model.model.norm):
            made.append(weakref.ref(norm(torch.ones(1, 2, 32))))
        position = model.model.rotary_emb(torch.ones(1, 2, 32), torch.arange(2)[None])
        made.append(weakref.ref(layer(torch.ones(1, 2, 32), position_embeddings=position)))
        gc.collect()
        assert [each() for each in made] == [None] * 4


def test_copies_and_pickles_of_a_served_model_are_plain_models():
    model = llama()
    expected = states(llama(), ROWS[0]).hidden_states  # transformers 5's own hooks cannot be pickled
    with thread_safe_outputs(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            with torch.no_grad():
                twin(input_ids=ROWS[0])
            assert hooks(twin) == 0
            assert same(expected, states(twin, ROWS[0]).hidden_states)
        assert same(expected, states(model, ROWS[0]).hidden_states)


@pytest.mark.parametrize("flag", [False, True, [0]])
def test_a_model_called_inside_its_own_call_keeps_both_apart(flag):
    model, reference, found = llama(), llama(), []
    outer = states(reference, ROWS[0]).hidden_states
    inner = states(reference, ROWS[1], output_hidden_states=flag).get("hidden_states")
    if POSITIONS == "any" and flag == [0]:
        inner = (inner[0], None, None)

    def call_again(*_):
        if not found:
            found.append(None)
            found.append(states(model, ROWS[1], output_hidden_states=flag).get("hidden_states"))

    with thread_safe_outputs(model):
        model.model.layers[1].register_forward_pre_hook(call_again)
        around = states(model, ROWS[0]).hidden_states
    if rules().by_hooks:  # else transformers keeps for a call whatever its layers give meanwhile
        assert same(outer, around)
    assert same(inner, found[1])


# What is refused


def test_what_cannot_be_served_is_refused():
    with pytest.raises(lading.CaptureError, match=r"Linear: found no transformers model.*use lading\.capture"):
        thread_safe_outputs(nn.Linear(2, 2))
    model = llama()
    with thread_safe_outputs(model):
        with pytest.raises(lading.CaptureError, match=r"Qwen3ForCausalLM: found flags that have a handle.*close that"):
            thread_safe_outputs(model)
        model.model.layers[0].compile(backend="eager")
        with pytest.raises(lading.CaptureError, match=r"Qwen3Model: found compiled modules: 'layers\.0'"):
            states(model, ROWS[0])
    with pytest.raises(lading.CaptureError, match=r"compiled modules: 'model\.layers\.0'"):
        thread_safe_outputs(model)
    assert hooks(model) == 0


def test_a_compiled_model_keeps_transformers_own_recorder():
    model = llama()
    expected = states(model, ROWS[0]).hidden_states
    with thread_safe_outputs(model):
        found = states(torch.compile(model, backend="eager"), ROWS[0]).hidden_states
        assert same(expected, found)
        assert same(expected, states(model, ROWS[0]).hidden_states)


def test_a_module_around_a_model_will_do():
    model = llama()
    expected = states(model, ROWS[0]).hidden_states
    with thread_safe_outputs(nn.Sequential(model)):
        assert hooks(model) > 0
        assert same(expected, states(model, ROWS[0]).hidden_states)
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_whole_graph_without_flags_still_compiles():
    model = llama()
    with thread_safe_outputs(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert same(model(ROWS[0], use_cache=False), compiled(ROWS[0], use_cache=False))


def test_a_capture_may_be_open_beside_it():
    model = llama()
    with thread_safe_outputs(model), lading.capture(model, "hidden_states") as seen:
        found = states(model, ROWS[0]).hidden_states
    assert same(tuple(found), seen.hidden_states)


def test_hooks_of_others_see_the_output_that_the_caller_gets():
    model, seen = llama(), []
    with thread_safe_outputs(model.model):
        handle = model.model.register_forward_hook(lambda _module, _args, output: seen.append(output))
        found = model.model(ROWS[0], output_hidden_states=True, return_dict=False)
        handle.remove()
    assert type(found) is tuple
    assert seen[0] is found


@pytest.mark.transformers4
def test_attention_that_gives_no_weights_is_warned_of():
    model = llama()
    model.set_attn_implementation("sdpa")
    with thread_safe_outputs(model), pytest.warns(UserWarning, match="`output_attentions=True` is not supported"):
        found = model(ROWS[0], output_attentions=True)
    assert found.attentions is None
