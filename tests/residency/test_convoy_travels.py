"""What travels with a micro-batch: random states, modes, autocast, devices, dtypes, context variables and captures."""

from __future__ import annotations

import contextvars

import pytest
import torch
from chain import DEVICE_MAP, Chain, seeded
from party import SEED, one_by_one
from torch import nn

import lading

WORD = contextvars.ContextVar("WORD", default="nobody's")


class Asked(nn.Module):
    """A chain that asks, between its blocks, what it finds around it."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.ask = ask

    def forward(self, x: torch.Tensor) -> list:
        found = [self.ask()]
        for layer in self.layers:
            x = layer(x)
            found.append(self.ask())
        return found


def answers(ask, width: int = 3, count: int = 7, **options) -> list:
    """Give what the model finds in a convoy, after seeing that it finds the same one by one."""
    model = seeded(Asked(ask))
    batches = [torch.ones(1, 64)] * count
    expected = one_by_one(model, batches)
    with lading.offload(model, {"": "disk"}):
        assert list(lading.convoy(model, batches, width=width, seed=SEED, **options)) == expected
    return expected


# Random states -------------------------------------------------------------------------------------------------------


class Dropping(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.5, training=True)
        return x + torch.rand(())


@pytest.mark.parametrize("width", [1, 2, 5, "auto"])
def test_dropout_draws_as_after_a_seed_of_its_own(width, x):
    model = seeded(Dropping())
    batches = [x] * 5
    expected = one_by_one(model, batches)
    assert len({tuple(output.flatten().tolist()) for output in expected}) == 5
    with lading.offload(model, {"": "disk"}):
        found = list(lading.convoy(model, batches, width=width, seed=SEED))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    plain = list(lading.convoy(model, batches, seed=SEED))
    assert all(torch.equal(one, other) for one, other in zip(plain, expected, strict=True))


@pytest.mark.parametrize("is_offloaded", [True, False])
@pytest.mark.parametrize("seed", [-7, 0, 1 << 63, (1 << 64) - 4])
def test_any_seed_of_torch_is_taken_as_it_is(seed, is_offloaded):
    model = seeded(Dropping())

    def run() -> list[int]:
        return list(lading.convoy(model, range(4), function=lambda _: torch.initial_seed(), seed=seed, width=2))

    if is_offloaded:
        with lading.offload(model, {"": "disk"}):
            found = run()
    else:
        found = run()
    with torch.random.fork_rng():
        assert found == [torch.manual_seed(seed + index).initial_seed() for index in range(4)]


def test_further_arguments_reach_a_function_too():
    model = seeded(Dropping())
    with lading.offload(model, {"": "disk"}):
        outputs = lading.convoy(model, [1, 2], function=lambda batch, *, scale: batch * scale, scale=3)
        assert list(outputs) == [3, 6]


def test_without_a_seed_one_is_drawn_from_the_callers_generator(x):
    model = seeded(Dropping())

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return list(lading.convoy(model, [x] * 4, width=2))

    with lading.offload(model, {"": "disk"}):
        first, second = run(), run()
        third = list(lading.convoy(model, [x] * 4, width=2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], third[0])


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_the_callers_random_state_and_dtype_are_its_own(is_offloaded, x):
    model = seeded(Dropping())
    torch.manual_seed(3)
    expected = [torch.rand(2) for _ in range(9)]
    torch.manual_seed(3)
    found = []

    def source():
        for _ in range(4):
            found.append(torch.rand(2))
            yield x

    def run() -> None:
        for _ in lading.convoy(model, source(), width=2, seed=SEED):
            found.append(torch.rand(2))

    if is_offloaded:
        with lading.offload(model, {"": "disk"}):
            run()
    else:
        run()
    found.append(torch.rand(2))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_the_callers_dtype_is_the_one_that_each_batch_begins_with(x):
    """One that model code sets around a block belongs to its batch, and is gone with it."""
    seen = []

    class Doubling(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_default_dtype())
            for number, layer in enumerate(self.layers):
                before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64 if number % 2 else torch.float16)
                x = layer(x) + torch.empty(()).to(torch.float32)
                assert torch.get_default_dtype() is (torch.float64 if number % 2 else torch.float16)
                torch.set_default_dtype(before)
            assert torch.get_default_dtype() is seen[-1]
            return x

    model = seeded(Doubling())
    with lading.offload(model, {"": "disk"}), lading.convoy(model, [x] * 7, width=2) as outputs:
        next(outputs)
        assert torch.get_default_dtype() is torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            rest = list(outputs)
            assert torch.get_default_dtype() is torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)
    assert len(rest) == 6
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 5


# Modes ---------------------------------------------------------------------------------------------------------------

MODES = {
    "nothing": (torch.enable_grad, torch.is_grad_enabled),
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype,
    ),
    "float16": (lambda: torch.autocast("cpu", torch.float16), lambda: torch.get_autocast_dtype("cpu")),
    "no cache": (
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    ),
    "device": (lambda: torch.device("meta"), lambda: (torch.empty(1).device, torch.get_default_device())),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_the_iteration_is_around_each_batch(mode):
    enter, ask = MODES[mode]
    model = seeded(Asked(ask))
    batches = [torch.ones(1, 64)] * 5
    with lading.offload(model, {"": "disk"}):
        outside = list(lading.convoy(model, batches, width=2))
        with enter():
            expected = [model(batch) for batch in batches]
            assert list(lading.convoy(model, batches, width=2)) == expected
    assert (outside != expected) == (mode != "nothing")


def test_a_default_device_that_was_set_counts():
    model = seeded(Asked(lambda: torch.empty(1).device.type))
    with lading.offload(model, {"": "disk"}):
        torch.set_default_device("meta")
        try:
            assert list(lading.convoy(model, [torch.ones(1, 64, device="cpu")] * 3, width=2)) == [["meta"] * 5] * 3
        finally:
            torch.set_default_device(None)


def test_a_mode_that_model_code_enters_stays_with_its_batch(x):
    class Mixed(Chain):
        def forward(self, x: torch.Tensor) -> list:
            is_odd = bool(x[0, 0] > 0)
            found = []
            for layer in self.layers:
                with torch.set_grad_enabled(is_odd), torch.autocast("cpu", torch.bfloat16, enabled=is_odd):
                    layer(x.abs())
                    found.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return found

    model = seeded(Mixed())
    batches = [torch.full((1, 256), float(sign)) for sign in (1, -1, 1, -1, 1)]
    with lading.offload(model, {"": "disk"}):
        found = list(lading.convoy(model, batches, width=4))
    assert found == [[(sign, sign)] * 8 for sign in (True, False, True, False, True)]


def test_threads_of_torch_are_as_many_in_each_batch():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(answers(torch.get_num_threads)[0]) == {2}
    finally:
        torch.set_num_threads(before)


# Contexts ------------------------------------------------------------------------------------------------------------


def test_context_variables_are_the_callers_and_each_batchs_own():
    def call(number: int) -> list:
        found = [WORD.get()]
        WORD.set(f"of {number}")
        found += model(torch.ones(1, 64))
        return found

    model = seeded(Asked(WORD.get))
    with lading.offload(model, {"": "disk"}):
        token = WORD.set("the caller's")
        try:
            found = list(lading.convoy(model, range(5), function=call, width=3))
            assert WORD.get() == "the caller's"
        finally:
            WORD.reset(token)
    assert found == [["the caller's", *[f"of {number}"] * 5] for number in range(5)]


def test_a_capture_around_the_iteration_sees_each_call(x):
    model = seeded(Chain())
    batches = [x + number for number in range(5)]
    with lading.capture(model, "layers.{0,7}") as alone:
        expected = [model(batch) for batch in batches]
    with lading.offload(model, DEVICE_MAP):
        with lading.capture(model, "layers.{0,7}") as seen:
            found = list(lading.convoy(model, batches, width=2))
        model(x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for name in alone.names:
        ours = sorted(tensor.sum().item() for tensor in seen.calls(name))
        assert ours == sorted(tensor.sum().item() for tensor in alone.calls(name))


def test_a_capture_inside_a_call_sees_its_own_batch(x):
    model = seeded(Chain())
    batches = [x + number for number in range(5)]

    def call(batch: torch.Tensor) -> torch.Tensor:
        with lading.capture(model, "layers.{0,3}") as seen:
            model(batch)
        return torch.cat([seen["layers.0"], seen["layers.3"]])

    expected = [call(batch) for batch in batches]
    with lading.offload(model, DEVICE_MAP):
        found = list(lading.convoy(model, batches, function=call, width=3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_capture_that_stops_early_ends_its_batch_there(x):
    model = seeded(Chain())
    batches = [x + number for number in range(5)]

    def call(batch: torch.Tensor) -> torch.Tensor:
        with lading.capture(model, "layers.2", stop_after="layers.2") as seen:
            model(batch)
        return seen["layers.2"]

    expected = [call(batch) for batch in batches]
    with lading.offload(model, DEVICE_MAP) as residency:
        found = list(lading.convoy(model, batches, function=call, width=5))
        assert residency.stats().fetches <= 5, "blocks that nobody waits for were opened"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradients_flow_through_a_convoy(mapped_chain, x):
    batches = [x + number for number in range(5)]
    resident, streamed = mapped_chain(), mapped_chain()
    for model in (resident, streamed):
        model.requires_grad_(True)
    for batch in batches:
        resident(batch).square().sum().backward()
    with lading.offload(streamed, DEVICE_MAP):
        for output in list(lading.convoy(streamed, batches, width=3)):
            output.square().sum().backward()
        with lading.convoy(streamed, batches, width=2) as outputs:
            for output in outputs:
                output.square().sum().backward()  # while others wait inside
    for (name, left), right in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        assert torch.equal(2 * left.grad, right.grad) or torch.allclose(2 * left.grad, right.grad, rtol=1e-5), name
