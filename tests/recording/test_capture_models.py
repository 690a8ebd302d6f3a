"""Captures of real transformers models: nothing is left behind, and what else is done to a model goes on working."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import lading
from zoo import BY_NAME, QUIET

# Names that work in both versions are deprecated in one.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")]
LLAMA = BY_NAME["llama"]
SITES = ["model.embed_tokens", "model.layers.0", "model.layers.1.self_attn", "model.layers.1", "model.norm", "lm_head"]


@pytest.fixture
def llama():
    return LLAMA.build()


def state_of(model: nn.Module) -> list[dict]:
    """Copy what modules hold, down to their tables of hooks."""
    return [
        {key: copy.copy(value) if isinstance(value, (dict, set, list)) else value for key, value in vars(m).items()}
        for m in model.modules()
    ]


def is_unchanged(model: nn.Module, before: list[dict]) -> bool:
    return all(
        now.keys() == then.keys() and all(now[key] is then[key] or now[key] == then[key] for key in now)
        for now, then in zip(state_of(model), before, strict=True)
    )


def calls_of(model: nn.Module) -> int:
    """Count the calls of Python and C functions in a forward."""
    num_calls, inputs = 0, LLAMA.inputs()

    def profile(_frame, event, _argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    with torch.no_grad():
        sys.setprofile(profile)
        try:
            model(**inputs)
        finally:
            sys.setprofile(None)
    return num_calls


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("site", SITES)
def test_an_exception_or_a_stop_at_any_site_leaves_the_model_as_it_was(llama, site, error):
    fresh, before, inputs = LLAMA.build(), state_of(llama), LLAMA.inputs()
    expected = fresh(**inputs).logits

    def fail(_tensor):
        raise error("injected")

    def fail_at_site(name, _tensor):
        if name == site:
            fail(name)

    with pytest.raises(error, match="injected"), lading.capture(llama, SITES, to=fail_at_site):
        llama(**inputs)
    assert is_unchanged(llama, before)
    with lading.capture(llama, SITES, stop_after=site) as seen:
        llama(**inputs)
    assert seen.calls(site)
    assert is_unchanged(llama, before)
    assert torch.equal(llama(**inputs).logits, expected)
    calls_of(fresh), calls_of(llama)  # what is cached at the first time
    assert calls_of(llama) == calls_of(fresh)
    assert torch.equal(pickle.loads(pickle.dumps(llama))(**inputs).logits, expected)


@torch.no_grad()
def test_the_end_of_hidden_states_is_chosen_by_name(llama):
    inputs = LLAMA.inputs()
    last, normed = "model.layers.1", "model.norm"
    with lading.capture(llama, [last, normed]) as seen:
        llama(**inputs)
    ends = {}
    for name in ("hidden_states", "hidden_states:prenorm", "hidden_states:postnorm"):
        with lading.capture(llama, name) as states:
            flagged = llama(**inputs, output_hidden_states=True).hidden_states
        assert len(states.hidden_states) == len(flagged)
        assert all(map(torch.equal, states.hidden_states[:-1], flagged[:-1]))
        ends[name] = states.hidden_states[-1]
    assert torch.equal(ends["hidden_states"], seen[normed])
    assert torch.equal(ends["hidden_states:prenorm"], seen[last])
    assert torch.equal(ends["hidden_states:postnorm"], seen[normed])
    assert not torch.equal(seen[last], seen[normed])
    for wrong in ("hidden_states:input", "attentions:prenorm"):
        with pytest.raises(lading.CaptureError, match=r"expected hidden_states with one of 'prenorm', 'postnorm'"):
            lading.capture(llama, wrong)
    with pytest.raises(lading.CaptureError, match=r"several ends of 'hidden_states' · .* another capture inside"):
        lading.capture(llama, ["hidden_states:prenorm", "hidden_states:postnorm"])


@torch.no_grad()
def test_a_model_that_gives_a_plain_tuple_ends_its_hidden_states_with_the_same_tensor(llama):
    inputs = LLAMA.inputs()
    with lading.capture(llama.model, "hidden_states") as seen:
        llama.model(**inputs, return_dict=False)
    flagged = llama.model(**inputs, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, seen.hidden_states, flagged))


def test_the_gpu_is_refused_where_there_is_none_and_so_is_what_is_no_device(llama, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(lading.CaptureError, match=r"to='gpu': found no accelerator"):
        lading.capture(llama, "lm_head", to="gpu")
    with pytest.raises(lading.CaptureError, match=r"to='nowhere'.*expected a device"):
        lading.capture(llama, "lm_head", to="nowhere")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_each_layer_once_and_the_same_gradients(llama, use_reentrant):
    inputs = LLAMA.inputs()
    labels = inputs["input_ids"]
    llama(**inputs, labels=labels).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in llama.named_parameters()}
    with lading.capture(llama.eval(), "model.layers.*") as plain:
        llama(**inputs)
    llama.zero_grad()
    llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    llama.enable_input_require_grads()
    llama.train()
    with lading.capture(llama, "model.layers.*") as seen:
        llama(**inputs, labels=labels, use_cache=False).loss.backward()
    assert all(torch.equal(seen[name], plain[name]) for name in plain)
    for name, weight in llama.named_parameters():
        assert torch.allclose(weight.grad, expected[name], atol=1e-6), name


@torch.no_grad()
def test_an_offloaded_model_under_a_small_budget_is_captured_by_many_threads_at_once(tmp_path):
    LLAMA.build().save_pretrained(tmp_path)
    batches = [LLAMA.inputs()["input_ids"].roll(number, 1) for number in range(6)]
    sites = ["model.layers.*", "model.norm"]
    resident = LLAMA.build()
    expected = []
    for ids in batches:
        with lading.capture(resident, sites) as seen:
            resident(ids)
        expected.append([seen[name] for name in seen])
    wrong: list[object] = []
    barrier = threading.Barrier(len(batches))
    total = sum(weight.nbytes for weight in resident.parameters())
    model = lading.load(tmp_path, plan=lading.plan(tmp_path, {"cpu": total // 2, "disk": 2 * total}))

    def work(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(10):
                with torch.no_grad(), lading.capture(model, sites) as seen:
                    model(batches[number])
                if not all(map(torch.equal, [seen[name] for name in seen], expected[number])):
                    wrong.append(number)
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lading.Residency.of(model).close()
    assert not wrong


@torch.no_grad()
@pytest.mark.needs("peft")
def test_adapters_may_be_wrapped_around_merged_and_taken_off_between_captures(llama):
    from peft import LoraConfig, get_peft_model

    inputs = LLAMA.inputs()
    with lading.capture(llama, "model.layers.*") as before:
        llama(**inputs)
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with lading.capture(wrapped, "base_model.model.model.layers.*", tokens="last") as seen:
        states = wrapped(**inputs, output_hidden_states=True).hidden_states
    mask = inputs["attention_mask"]
    kept, state = seen["base_model.model.model.layers.0"], states[1]
    assert torch.equal(kept, state[torch.arange(2), mask.sum(1) - 1])
    assert not torch.equal(state, before["model.layers.0"])
    plain = wrapped.unload()
    with lading.capture(plain, "model.layers.*") as after:
        plain(**inputs)
    assert all(torch.equal(after[name], before[name]) for name in before)


GROWTH = """
import torch
from torch import nn
import lading

net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))).eval()
x = torch.ones(2, 5, 16)

def rss():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

def run(times):
    for number in range(times):
        with torch.no_grad(), lading.capture(net, "*", tokens="last") as seen:
            net(x)
        try:
            with torch.no_grad(), lading.capture(net, "*", stop_after="1"):
                net(x)
                raise AssertionError("unreached")
        except RuntimeError:
            pass

run(500)
before = rss()
run(NUMBER // 2)
print(rss() - before)
"""


@pytest.mark.parametrize("num_captures", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_captures_leave_no_memory_behind(num_captures):
    found = subprocess.run(
        [sys.executable, "-c", GROWTH.replace("NUMBER", str(num_captures))],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) < 2**20
