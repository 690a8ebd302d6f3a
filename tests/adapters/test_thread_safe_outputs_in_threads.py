"""Transformers' flags with a handle, called from many threads and tasks, beside compilations: each gets its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flagged import HIDDEN, MARKS, ROWS, build, hooks, llama, same, states
from torch import nn

import lading
from architectures import MAJOR
from crowd import run_together
from lading.adapters.transformers import thread_safe_outputs
from zoo import BY_NAME

pytestmark = MARKS


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


@pytest.mark.transformers4
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
