"""Which call is which: masks, generation, shared layers, interrupts, overlapping captures, frames in tracebacks."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

import lading
from zoo import BY_NAME, QUIET

pytestmark = QUIET
OURS = str(Path(lading.__file__).parent)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.fails_with: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails_with is not None:
            raise self.fails_with
        return torch.tanh(self.lin(x))


class Net(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(requires_grad=False)


def x_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Masks


def test_a_mask_given_by_position_counts_as_one_given_by_name(net):
    x, mask = x_of(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with lading.capture(net, "layers.1", tokens="last") as named:
        net(x, attention_mask=mask)
    with lading.capture(net, "layers.1", tokens="last") as placed:
        net(x, mask)
    assert torch.equal(named["layers.1"], placed["layers.1"])
    assert not torch.equal(named["layers.1"], net.layers[1](net.layers[0](x))[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("num_targets", [5, 9])
def test_a_decoder_is_read_by_the_decoders_mask_and_an_encoder_by_its_own(num_targets):
    t5 = BY_NAME["t5"]
    model, inputs = t5.build(), t5.inputs()
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :num_targets]
    targets = torch.ones(2, num_targets, dtype=torch.long)
    targets[0, -3:] = 0
    sites = ["encoder.block.1", "decoder.block.1"]
    for mask, last in ((targets, num_targets - 4), (None, num_targets - 1)):
        given = {**inputs, "decoder_attention_mask": mask}
        with lading.capture(model, sites) as whole, lading.capture(model, sites, tokens="last") as seen:
            model(**given)
        assert torch.equal(seen[sites[0]][1], whole[sites[0]][1, -3])  # the second row is padded by two
        assert torch.equal(seen[sites[1]][0], whole[sites[1]][0, last])
        assert torch.equal(seen[sites[1]][1], whole[sites[1]][1, -1])


@torch.no_grad()
def test_an_encoder_that_merges_tokens_is_read_by_the_mask_that_it_makes_of_the_given_one():
    wav2vec2 = BY_NAME["wav2vec2"]
    model, inputs = wav2vec2.build(), wav2vec2.inputs()
    inputs["attention_mask"] = torch.ones(inputs["input_values"].shape, dtype=torch.long)
    inputs["attention_mask"][1, -200:] = 0
    site = next(name for name, _ in model.named_modules() if name.endswith("encoder.layers.1"))
    with lading.capture(model, site) as whole, lading.capture(model, site, tokens="last") as seen:
        model(**inputs)
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(440)))
    assert 1 < frames < whole[site].shape[1]
    assert torch.equal(seen[site][0], whole[site][0, -1])
    assert torch.equal(seen[site][1], whole[site][1, frames - 1])


def test_a_mask_of_other_tokens_is_refused_unless_it_leaves_none_out(net):
    x, mask = x_of(), torch.ones(2, 3)
    with lading.capture(net, "layers.0", tokens="last") as seen:
        net(x, attention_mask=mask)
    assert torch.equal(seen["layers.0"], net.layers[0](x)[:, -1])
    mask[0, -1] = 0
    with (
        pytest.raises(lading.CaptureError, match=r"mask for site 'layers.0': found shape \(2, 3\) · expected \[2, 5\]"),
        lading.capture(net, "layers.0", tokens="last"),
    ):
        net(x, attention_mask=mask)


def test_a_worker_in_a_copy_of_the_context_has_the_mask_of_the_call(net):
    class Delegates(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            async def run() -> torch.Tensor:
                return await asyncio.to_thread(self.inner.layers[0], x)

            return asyncio.run(run())

    x, mask = x_of(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with lading.capture(Delegates(net), "inner.layers.0", tokens="last") as seen:
        seen._model(x, attention_mask=mask)
    assert torch.equal(seen["inner.layers.0"][0], net.layers[0](x)[0, 2])


# Generation and other models that are called several times


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_gives_every_step_in_order_the_prefill_first(name):
    architecture = BY_NAME[name]
    model = architecture.build()
    inputs = {key: value for key, value in architecture.inputs().items() if not key.startswith("decoder")}
    layers = {"gpt2": "transformer.h.*", "llama": "model.layers.*", "t5": "decoder.block.*"}[name]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with lading.capture(model, layers) as seen:
        model.generate(**inputs, **options)
    flagged = model.generate(**inputs, **options, output_hidden_states=True)
    steps = flagged.decoder_hidden_states if name == "t5" else flagged.hidden_states
    assert len(steps) == 4
    for number, site in enumerate(list(seen)[:-1]):  # the last entry is behind the final norm
        assert len(seen.calls(site)) == len(steps)
        assert all(torch.equal(kept, step[number + 1]) for kept, step in zip(seen.calls(site), steps, strict=True))


@torch.no_grad()
@pytest.mark.transformers5
@pytest.mark.parametrize(("name", "group"), [("llama", "hidden_states"), ("t5", "decoder.hidden_states")])
def test_a_group_gives_one_tuple_for_each_step_of_generation(name, group):
    architecture = BY_NAME[name]
    model = architecture.build()
    inputs = {key: value for key, value in architecture.inputs().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with lading.capture(model, "hidden_states") as seen:
        model.generate(**inputs, **options)
    flagged = model.generate(**inputs, **options, output_hidden_states=True)
    steps = flagged.decoder_hidden_states if name == "t5" else flagged.hidden_states
    assert len(seen.calls(group)) == len(steps) == 4
    for kept, step in zip(seen.calls(group), steps, strict=True):
        assert len(kept) == len(step)
        assert all(torch.equal(one, other) for one, other in zip(kept, step, strict=True))
    with pytest.raises(lading.CaptureError, match=r"found 4 calls .* use calls\("):
        seen.group(group)


@torch.no_grad()
@pytest.mark.transformers5
def test_groups_of_functions_that_run_at_once_are_not_mixed():
    llama = BY_NAME["llama"]
    model = llama.build()
    batches = [llama.inputs()["input_ids"].roll(number, 1) for number in range(8)]
    expected = [model(ids, output_hidden_states=True).hidden_states for ids in batches]
    with lading.capture(model, "hidden_states") as seen, ThreadPoolExecutor(4) as executor:
        call = seen.bind(torch.no_grad()(model.__call__))
        list(executor.map(call, batches * 4))
    found = seen.calls("hidden_states")
    assert len(found) == 32
    for kept in found:
        assert any(all(map(torch.equal, kept, states)) for states in expected)


@torch.no_grad()
def test_a_layer_used_twice_and_a_child_called_alone_are_each_kept_once_a_call():
    albert = BY_NAME["albert"]
    model, inputs = albert.build(), albert.inputs()
    site = next(name for name, _ in model.named_modules() if name.endswith("albert_layers.0"))
    with lading.capture(model, site) as seen:
        states = model(**inputs, output_hidden_states=True).hidden_states
        model.get_submodule(site)(states[0])
    assert len(seen.calls(site)) == len(states) - 1 + 1
    assert all(torch.equal(*pair) for pair in zip(seen.calls(site), states[1:], strict=False))


def test_a_capture_of_a_part_hears_it_in_calls_of_the_whole_and_reads_its_mask_there(net):
    x, mask = x_of(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with (
        lading.capture(net.layers, "1", tokens="last") as part,
        lading.capture(net, "layers.1", tokens="last") as whole,
    ):
        net(x, attention_mask=mask)
    assert torch.equal(part["1"], whole["layers.1"])


# Interrupts and overlaps


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, RuntimeError])
def test_an_interrupt_inside_forward_leaves_nothing_to_the_next_call(net, error):
    x, mask = x_of(), torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    with lading.capture(net, "layers.0", tokens="last") as seen:
        net.layers[1].fails_with = error()
        with pytest.raises(error):
            net(x, attention_mask=mask)
        net.layers[1].fails_with = None
        net.layers[0](x)  # alone: no mask, and not the interrupted call's
        net(x)
    expected = net.layers[0](x)
    assert [torch.equal(kept, expected[:, at]) for kept, at in zip(seen.calls("layers.0"), (0, -1, -1), strict=True)]
    assert hooks_of(net) == 0
    assert not seen._running


def test_a_thread_that_was_interrupted_is_still_noticed_where_it_does_anothers_work(net):
    class Delegates(nn.Module):
        def __init__(self, inner: Net, executor: ThreadPoolExecutor) -> None:
            super().__init__()
            self.inner, self.executor = inner, [executor]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.executor[0].submit(self.inner.layers[1], self.inner.layers[0](x)).result()

    def interrupted() -> None:
        with lading.capture(net, "layers.*"):
            net(x_of())

    with ThreadPoolExecutor(1) as executor:
        net.layers[1].fails_with = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            executor.submit(interrupted).result()
        net.layers[1].fails_with = None
        model = Delegates(net, executor)
        with (
            pytest.raises(lading.CaptureError, match=r"'inner\.layers\.1' called in a thread that does not listen"),
            lading.capture(model, "inner.layers.*"),
        ):
            model(x_of())


def test_another_threads_own_forward_is_no_part_of_a_call(net):
    """A forward that was running when the capture opened is unknown to its hooks, and yet not done for the call."""

    class Waits(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, before=lambda: None, after=lambda: None, num_layers: int = 3):
            before()
            for layer in list(self.inner.layers)[:num_layers]:
                x = layer(x)
            after()
            return x

    model = Waits(net)
    with ThreadPoolExecutor(2) as executor:
        begun, opened, called, done = (threading.Event() for _ in range(4))
        other = executor.submit(model, x_of(1), lambda: (begun.set(), opened.wait(), called.wait()), done.set)
        begun.wait()
        with lading.capture(model, "inner.layers.*") as seen:
            opened.set()
            model(x_of(), after=lambda: (called.set(), done.wait()), num_layers=2)
        other.result()
    assert [len(seen.calls(name)) for name in seen] == [1, 1, 0]


def test_captures_that_overlap_each_hear_until_they_close(net):
    with ExitStack() as first, ExitStack() as second:
        one = first.enter_context(lading.capture(net, "layers.0"))
        other = second.enter_context(lading.capture(net, "layers.0"))
        net(x_of())
        first.close()
        net(x_of(1))
        second.close()
        net(x_of(2))
    assert (len(one.calls("layers.0")), len(other.calls("layers.0"))) == (1, 2)
    assert hooks_of(net) == 0


def test_a_capture_closed_in_another_context_leaves_no_hook(net):
    async def stream():
        with lading.capture(net, "layers.0") as seen:
            for seed in range(3):
                net(x_of(seed))
                yield seen.calls("layers.0")[-1]

    async def take_one() -> torch.Tensor:
        items = stream()
        first = await asyncio.create_task(anext_of(items))
        await asyncio.create_task(items.aclose())
        return first

    async def anext_of(items) -> torch.Tensor:
        return await items.__anext__()

    assert torch.equal(asyncio.run(take_one()), net.layers[0](x_of()))
    assert hooks_of(net) == 0


def test_streams_of_several_tasks_keep_to_themselves(net):
    async def stream(seed: int):
        with lading.capture(net, "layers.2") as seen:
            for step in range(4):
                net(x_of(seed * 10 + step))
                await asyncio.sleep(0)
                yield seen.calls("layers.2")

    async def one(seed: int) -> bool:
        kept: list[torch.Tensor] = []
        async for calls in stream(seed):
            kept = calls
        return all(torch.equal(tensor, net(x_of(seed * 10 + step))) for step, tensor in enumerate(kept)) and (
            len(kept) == 4
        )

    async def every() -> list[bool]:
        return await asyncio.gather(*[asyncio.create_task(one(seed)) for seed in range(8)])

    assert all(asyncio.run(every()))


def test_a_copy_that_torch_makes_to_run_elsewhere_is_heard_or_refused_as_its_original(net):
    class Parallel(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner
            self.run = lambda function, x: function(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as executor:
                replica = self.inner.layers[0]._replicate_for_data_parallel()  # as nn.DataParallel does
                replica._parameters = dict(self.inner.layers[0]._parameters)
                return executor.submit(self.run, replica, x).result()

    model = Parallel(net)
    with pytest.raises(lading.CaptureError, match="does not listen"), lading.capture(model, "inner.layers.0"):
        model(x_of())
    with lading.capture(model, "inner.layers.0") as seen:
        model.run = seen.bind(lambda function, x: function(x))
        assert torch.equal(model(x_of()), seen["inner.layers.0"])


def test_a_forward_that_meets_a_hook_on_its_way_in_or_out_passes(net):
    """torch notes a hook, and that it takes keyword arguments, in two steps, and a forward may run between them."""
    with ThreadPoolExecutor(1) as executor, lading.capture(net, "layers.0"):
        net._forward_pre_hooks_with_kwargs.clear()
        net.layers[0]._forward_hooks_with_kwargs.clear()
        found = executor.submit(net, x_of()).result()
    assert torch.equal(found, net(x_of()))


# Tracebacks


def frames_of_ours(error: BaseException) -> list[str]:
    return [f.name for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(OURS)]


def test_a_traceback_shows_none_of_us_when_idle_and_at_most_two_frames_a_site(net):
    def fail(_tensor):
        raise ValueError("injected")

    net.layers[1].fails_with = ValueError("injected")
    with lading.capture(net, "layers.*"), pytest.raises(ValueError, match="injected") as caught:
        net(x_of())
    assert frames_of_ours(caught.value) == []  # hooks stand behind layers, not around them
    with pytest.raises(ValueError, match="injected") as caught:
        net(x_of())
    assert frames_of_ours(caught.value) == []
    net.layers[1].fails_with = None
    for options in ({"reduce": fail}, {"to": lambda _name, tensor: fail(tensor)}):
        with lading.capture(net, "layers.*", **options), pytest.raises(ValueError, match="injected") as caught:
            net(x_of())
        assert len(frames_of_ours(caught.value)) == 2, options
    assert hooks_of(net) == 0


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_a_capture_is_open_is_not_heard_and_sheds_its_hooks(make):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4)
    with lading.capture(net, "0") as seen:
        twin = make(net)
        assert torch.equal(twin(x), net(x))
        assert torch.equal(twin(x), net(x))
    assert len(seen.calls("0")) == 2
    for module in twin.modules():
        assert not [key for key, value in vars(module).items() if key.startswith("_forward") and value]
    assert repr(seen) == "<Capture closed, calls: 0: 2>"


@torch.no_grad()
def test_a_capture_that_ended_in_another_context_is_let_go_by_the_next_one(net):
    def opened():
        with lading.capture(net, "layers.*") as seen:
            yield seen

    holder = opened()
    ended = weakref.ref(next(holder))
    contextvars.copy_context().run(holder.close)
    with lading.capture(net, "layers.*"):
        net(x_of())
    del holder
    gc.collect()
    assert ended() is None
