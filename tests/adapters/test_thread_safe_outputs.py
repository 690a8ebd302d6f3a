"""Transformers' flags with a handle: what transformers gives one thread alone, in every thread, and nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lading
from architectures import MAJOR, Architecture
from crowd import run_together
from lading.adapters.transformers import thread_safe_outputs
from lading.adapters.transformers_recorder import find_recorder
from zoo import BY_NAME, EVERY, QUIET

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning"),
]
HIDDEN, ATTENTIONS, ROUTER = "output_hidden_states", "output_attentions", "output_router_logits"
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
ROWS = torch.arange(8 * 2 * 9).reshape(8, 2, 9) % 80 + 10


def build(architecture: Architecture, **settings: bool):
    """Build a model whose attention gives weights, and write flags into all of its configurations."""
    model = architecture.build()
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("eager")
    for part in model.modules():
        for name, value in settings.items():
            config = getattr(part, "config", None)
            if hasattr(config, name) and (name != ATTENTIONS or config._attn_implementation == "eager"):
                setattr(config, name, value)
    return model


def outcome(architecture: Architecture, model: nn.Module, **flags):
    """Give what a call returns or raises."""
    torch.manual_seed(0)
    method = model if architecture.forward == "__call__" else getattr(model, architecture.forward)
    try:
        with torch.no_grad():
            return method(**architecture.inputs(), **flags)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return type(error).__name__, str(error)


def same(one, other) -> bool:
    """Compare nested outputs bit for bit: types, keys, their order, every tensor and every None."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one).__module__.startswith("transformers.") and hasattr(one, "__dict__"):
        return same(dict(vars(one)), dict(vars(other)))
    return True


def decorated(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if find_recorder(type(each).forward) is not None]


def hooks(model: nn.Module) -> int:
    """Count lading's hooks; transformers 5 leaves some of its own where it recorded."""
    tables = [table for each in model.modules() for table in (each._forward_hooks, each._forward_pre_hooks)]
    return sum(type(hook).__module__.startswith("lading.") for table in tables for hook in table.values())


def attributes(model: nn.Module) -> list[dict]:
    return [
        {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(each).items()}
        for each in model.modules()
    ]


def llama(name: str = "qwen3"):
    return BY_NAME[name].build()


def states(model: nn.Module, rows: torch.Tensor, **flags):
    with torch.no_grad():
        return model(input_ids=rows, **{HIDDEN: True, **flags})


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


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral"])
def test_positions_of_hidden_states_leave_none_in_place_of_the_others(name):
    model, rows = llama(name), ROWS[0]
    every = states(model, rows).hidden_states
    with thread_safe_outputs(model):
        some = states(model, rows, output_hidden_states=[1, -1, 99]).hidden_states
        first = states(model, rows, output_hidden_states=-len(every)).hidden_states
    assert [each is not None for each in some] == [index in (1, len(every) - 1) for index in range(len(every))]
    assert torch.equal(some[-1], every[-1])
    assert torch.equal(some[1], every[1])
    assert [each is not None for each in first] == [True] + [False] * (len(every) - 1)


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


# Many threads


def compile_for(stop: threading.Event) -> None:
    """Compile one function after another, none of them of the model."""
    while not stop.is_set():
        torch._dynamo.reset()
        torch.compile(lambda x: (x * 2).sin() + 1, backend="eager")(torch.ones(3))


def wrong_answers(model: nn.Module, call, threads: int = 8, repeats: int = 12) -> int:
    """Count wrong answers to calls from many threads, each with its own input."""
    with torch.no_grad():
        expected = [call(model, rows) for rows in ROWS]
    found: list[bool] = []

    def work(index: int) -> None:
        for _ in range(repeats):
            found.append(same(expected[index], call(model, ROWS[index])))

    raised = run_together([lambda index=index: work(index) for index in range(threads)])
    assert not raised, raised
    assert len(found) == threads * repeats
    return found.count(False)


def everything(model: nn.Module, rows: torch.Tensor):
    output = states(model, rows, output_attentions=True)
    return output.hidden_states, output.attentions, output.logits


@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral"])
def test_threads_each_get_their_own_states(name, is_compiling):
    model, stop = build(BY_NAME[name]), threading.Event()
    helper = threading.Thread(target=compile_for, args=(stop,))
    with thread_safe_outputs(model):
        if is_compiling:
            helper.start()
        try:
            assert wrong_answers(model, everything) == 0
        finally:
            stop.set()
            if is_compiling:
                helper.join()


def overlapping_beside_a_compilation(model: nn.Module) -> list:
    """Give the states of one call, and of one in another thread that begins and ends between its layers."""
    found: list = [None, None]

    def work(index: int) -> None:
        found[index] = states(model, ROWS[index]).hidden_states

    def begin_the_other(*_) -> None:
        if found[1] is None:
            found[1] = ()
            assert run_together([lambda: work(1)]) == []

    def backend(graph, _):  # called while the process is compiling
        assert run_together([lambda: work(0)]) == []
        return graph.forward

    between = model.model.layers[1].register_forward_pre_hook(begin_the_other)
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3))
    between.remove()
    return found


def test_a_compilation_elsewhere_loses_no_states():
    reference, model = llama(), llama()
    expected = [states(reference, rows).hidden_states for rows in ROWS[:2]]
    with thread_safe_outputs(model):
        assert same(expected, overlapping_beside_a_compilation(model))
    if MAJOR >= 5:
        assert not same(expected, overlapping_beside_a_compilation(model))  # without it


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "clip"])
def test_ten_thousand_calls_from_threads_are_right(name):
    architecture = BY_NAME[name]
    model = build(architecture)
    inputs = [{key: value.roll(shift, -1) for key, value in architecture.inputs().items()} for shift in range(8)]

    def call(model, rows):
        with torch.no_grad():
            return dict(model(**inputs[int(rows[0, 0] - 10) % 8], **{HIDDEN: True}))

    with thread_safe_outputs(model):
        assert wrong_answers(model, call, repeats=1250) == 0


def test_executors_and_tasks_get_their_own_states():
    model = llama()
    expected = [states(model, rows).hidden_states for rows in ROWS]

    async def gather():
        return await asyncio.gather(*(asyncio.to_thread(states, model, rows) for rows in ROWS))

    with thread_safe_outputs(model):
        with ThreadPoolExecutor(4) as pool:
            pooled = list(pool.map(lambda rows: states(model, rows).hidden_states, ROWS))
        tasks = [each.hidden_states for each in asyncio.run(gather())]
    assert same(expected, pooled)
    assert same(expected, tasks)


def test_threads_with_and_without_flags_do_not_hear_each_other():
    model = llama()
    with thread_safe_outputs(model):

        def call(model, rows):
            is_asked = bool(rows[0, 0] % 4 < 2)
            output = states(model, rows, output_hidden_states=is_asked)
            assert (output.get("hidden_states") is not None) == is_asked
            return dict(output, past_key_values=None)

        assert wrong_answers(model, call) == 0


class _Elsewhere(nn.Module):
    """Run a layer in another thread."""

    def __init__(self, layer: nn.Module, *, in_context: bool) -> None:
        super().__init__()
        self.layer = layer
        self.in_context = in_context

    def __getattr__(self, name: str):
        return getattr(super().__getattr__("layer"), name) if name == "attention_type" else super().__getattr__(name)

    def forward(self, *args, **kwargs):
        def call(*args, **kwargs):
            with torch.no_grad():
                return self.layer(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            if self.in_context:
                return pool.submit(contextvars.copy_context().run, call, *args, **kwargs).result()
            return pool.submit(call, *args, **kwargs).result()


def test_layers_that_another_thread_runs_are_recorded_or_refused():
    model = llama()
    expected = states(model, ROWS[0]).hidden_states
    layers = list(model.model.layers)
    with thread_safe_outputs(model):
        model.model.layers[1] = _Elsewhere(layers[1], in_context=True)
        assert same(expected, states(model, ROWS[0]).hidden_states)
        model.model.layers[1] = _Elsewhere(layers[1], in_context=False)
        with pytest.raises(lading.CaptureError, match=r"Qwen3Model.*'layers.1.layer' called in a thread outside"):
            states(model, ROWS[0])
        model.model.layers[1] = layers[1]
        assert same(expected, states(model, ROWS[0]).hidden_states)


# Nothing kept, nothing left


def test_calls_from_threads_keep_no_tensor_and_patch_no_layer():
    """https://github.com/huggingface/transformers/issues/42673: Qwen3, states asked for, from several threads."""
    model = llama()
    made: list[weakref.ref] = []

    def call() -> None:
        for rows in ROWS[:4]:
            made.extend(weakref.ref(each) for each in states(model, rows, use_cache=False).hidden_states)

    with thread_safe_outputs(model):
        assert run_together([call] * 8) == []
        gc.collect()
        assert len(made) == 8 * 4 * (len(model.model.layers) + 1)
        assert not any(each() is not None for each in made)
        assert not any("forward" in vars(each) for each in model.modules())
    assert hooks(model) == 0


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 replaces no forward")
def test_without_it_transformers_4_leaves_layers_patched_that_hold_tensors():
    model = llama()
    made: list[weakref.ref] = []

    def call() -> None:
        for rows in ROWS:
            made.extend(weakref.ref(each) for each in states(model, rows, use_cache=False).hidden_states)

    run_together([call] * 8)  # whatever they raise
    gc.collect()
    assert any("forward" in vars(each) for each in model.modules())
    assert any(each() is not None for each in made)


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
    outer, inner = (states(reference, rows).hidden_states for rows in ROWS[:2])

    def call_again(*_):
        if not found:
            found.append(None)
            found.append(states(model, ROWS[1], output_hidden_states=flag).get("hidden_states"))

    with thread_safe_outputs(model):
        model.model.layers[1].register_forward_pre_hook(call_again)
        around = states(model, ROWS[0]).hidden_states
    if MAJOR >= 5:  # transformers 4 keeps for a call whatever its layers give meanwhile
        assert same(outer, around)
    assert same(None if flag is False else inner if flag is True else (inner[0], None, None), found[1])


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
