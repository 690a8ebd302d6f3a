"""Convoys among other threads, inside each other and misused: nobody waits for ever, exactly one thread runs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import pytest
import torch
from chain import DEVICE_MAP, Chain, seeded
from party import convoy_threads, watched

import lading
from crowd import PATIENCE_S


def same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def batches(x):
    return [x + number for number in range(6)]


# One runs ------------------------------------------------------------------------------------------------------------


def test_exactly_one_thread_of_a_convoy_runs_also_between_blocks(x):
    wrong = []
    lock = threading.Lock()

    class Alone(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                if not lock.acquire(blocking=False):
                    wrong.append("two at once")
                for _ in range(20):
                    time.sleep(0)
                    x = x + 0.001
                lock.release()
                x = layer(x)
            return x

    model = seeded(Alone())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with lading.offload(model, {"": "disk"}):
            for _ in lading.convoy(model, [x] * 9, width=4):
                if not lock.acquire(blocking=False):
                    wrong.append("a member beside the leader")
                time.sleep(0)
                lock.release()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# Together ------------------------------------------------------------------------------------------------------------


def test_several_convoys_and_plain_forwards_go_beside_each_other(mapped_chain, batches):
    model = mapped_chain()
    expected = [model(batch) for batch in batches]
    wrong = []

    def cross(width) -> None:
        for _ in range(2):
            wrong.append(not same(list(lading.convoy(model, batches, width=width)), expected))

    def call() -> None:
        for _ in range(3):
            wrong.append(not same([model(batch) for batch in batches], expected))

    with lading.offload(model, DEVICE_MAP) as residency:
        watched(lambda: cross(6), lambda: cross("auto"), lambda: cross(2), call, call)
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes
    assert not any(wrong)


def test_two_convoys_of_one_thread_take_turns(mapped_chain, batches):
    model = mapped_chain()
    expected = [model(batch) for batch in batches]
    found: tuple[list, list] = ([], [])

    def both() -> None:
        first, second = (lading.convoy(model, batches, width=width) for width in (2, 3))
        for one, other in zip(first, second, strict=True):
            found[0].append(one)
            found[1].append(other)

    with lading.offload(model, DEVICE_MAP):
        watched(both)
    assert same(found[0], expected)
    assert same(found[1], expected)


def test_a_convoy_inside_a_call_of_another(mapped_chain, batches):
    model = mapped_chain()
    expected = [torch.stack([model(batch + row) for row in range(3)]) for batch in batches]

    def call(batch: torch.Tensor) -> torch.Tensor:
        inner = lading.convoy(model, [batch + row for row in range(3)], width=2)
        return torch.stack([next(inner), model(batch + 1), *list(inner)[1:]])

    found = []
    with lading.offload(model, DEVICE_MAP):
        watched(lambda: found.extend(lading.convoy(model, batches, function=call, width=3)))
    assert same(found, expected)
    assert not convoy_threads()


# Editing -------------------------------------------------------------------------------------------------------------


def waits_to_edit(residency: lading.Residency) -> None:
    while not residency._parts.schedule._editors:
        time.sleep(0)


@pytest.mark.parametrize("what", ["iterate", "call", "another", "inside a call"])
def test_who_edits_waits_for_the_crossing_and_what_its_leader_does_meanwhile(mapped_chain, batches, what):
    model = mapped_chain()
    expected = [model(batch) for batch in batches]
    done = []

    def edit() -> None:
        with residency.editing():
            done.append("edited")

    def call(batch: torch.Tensor) -> torch.Tensor:
        if editor.ident is None:
            editor.start()
            waits_to_edit(residency)
        return next(iter(lading.convoy(model, [batch], width=1))) + 0 * model(batch)

    def iterate() -> None:
        outputs = lading.convoy(model, batches, width=3, **({"function": call} if what == "inside a call" else {}))
        found = [next(outputs)]
        if what != "inside a call":
            editor.start()
            waits_to_edit(residency)
        if what == "call":
            assert torch.equal(model(batches[0]), expected[0])
        if what == "another":
            assert same(list(lading.convoy(model, batches, width=2)), expected)
        assert done == []
        assert same([*found, *outputs], expected)

    editor = threading.Thread(target=edit, daemon=True)
    with lading.offload(model, DEVICE_MAP) as residency:
        watched(iterate)
        editor.join(PATIENCE_S)
    assert done == ["edited"]


@pytest.mark.parametrize("what", ["editing", "close"])
@pytest.mark.parametrize("where", ["between outputs", "inside a call"])
def test_editing_and_closing_inside_a_convoy_are_refused(mapped_chain, batches, what, where):
    model = mapped_chain()
    expected = [model(batch) for batch in batches]

    def wait_for_oneself() -> None:
        with pytest.raises(lading.ResidencyError, match=r"a convoy of this thread under way.*close\(\) it first"):
            residency.editing().__enter__() if what == "editing" else residency.close()

    def call(batch: torch.Tensor) -> torch.Tensor:
        if where == "inside a call":
            wait_for_oneself()
        return model(batch)

    def iterate() -> None:
        found = []
        for output in lading.convoy(model, batches, function=call, width=4):
            found.append(output)
            if where == "between outputs" and len(found) not in (4, 6):
                wait_for_oneself()
        assert same(found, expected)

    with lading.offload(model, DEVICE_MAP) as residency:
        watched(iterate)


def test_an_error_that_leaves_the_residency_takes_its_convoys_along(mapped_chain, batches):
    model = mapped_chain()
    outputs = None

    def leave() -> None:
        nonlocal outputs
        with lading.offload(model, DEVICE_MAP):
            outputs = lading.convoy(model, batches, width=3)
            next(outputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watched(leave)
    assert not convoy_threads()
    assert lading.Residency.of(model) is None


# Misuse --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_an_iterator_inside_its_own_call_or_source_is_refused(mapped_chain, batches, is_offloaded):
    model = mapped_chain()
    expected = [model(batch) for batch in batches]
    refused = []

    def use() -> None:
        with pytest.raises(lading.ResidencyError, match="used by several threads or processes, or by one of its own"):
            next(outputs)
        with pytest.raises(lading.ResidencyError, match="used by several"):
            outputs.close()
        refused.append(True)

    def call(batch: torch.Tensor) -> torch.Tensor:
        use()
        return model(batch)

    def source():
        use()
        yield from batches

    with lading.offload(model, DEVICE_MAP) if is_offloaded else contextlib.nullcontext():
        outputs = lading.convoy(model, source(), function=call, width=3)
        assert same(list(outputs), expected)
    assert len(refused) == 7


def test_another_thread_may_not_iterate_meanwhile(mapped_chain, batches):
    model = mapped_chain()
    errors = []

    def use() -> None:
        try:
            next(outputs)
        except lading.ResidencyError as error:
            errors.append(str(error))

    def source():
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(PATIENCE_S)
        yield from batches

    with lading.offload(model, DEVICE_MAP):
        outputs = lading.convoy(model, source(), width=3)
        assert len(list(outputs)) == 6
    assert len(errors) == 1
    assert "one thread that iterates" in errors[0]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_leave_a_convoy_and_call_the_model(mapped_chain, batches):
    model = mapped_chain()
    torch.set_num_threads(1)
    with lading.offload(model, DEVICE_MAP), torch.no_grad():
        expected = [model(batch) for batch in batches]
        with lading.convoy(model, batches, width=3) as outputs:
            found = [next(outputs)]
            child = os.fork()
            if not child:
                status = 1
                try:
                    try:
                        next(outputs)
                    except lading.ResidencyError as error:
                        status = 2 if "used by several threads or processes" in str(error) else 3
                    outputs.close()
                    if status == 2 and torch.equal(model(batches[1]), expected[1]):
                        again = list(lading.convoy(model, batches, width=2))
                        status = 0 if same(again, expected) else 4
                finally:
                    os._exit(status)
            end = time.monotonic() + PATIENCE_S
            while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(0.01)
            found += list(outputs)
    assert waited == (child, 0)
    assert same(found, expected)


# User code that waits for another batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["barrier", "lock"])
def test_code_that_waits_for_another_batch_is_found_and_named(x, kind):
    barrier, lock = threading.Barrier(3), threading.Lock()

    class Waiting(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "barrier":
                x = self.layers[0](x)
                if threading.current_thread().name == "lading-convoy":
                    barrier.wait()
                return self.layers[1](x)
            with lock:
                return self.layers[1](self.layers[0](x))

    model = seeded(Waiting())
    with lading.offload(model, {"": "disk"}) as residency:
        expected = model(x)

        def iterate() -> None:
            outputs = lading.convoy(model, [x] * 3, width=3, patience_s=0.7)
            with pytest.raises(
                lading.ResidencyError, match=rf"a micro-batch that waits at {__file__}:\d+ while 2 others"
            ):
                list(outputs)

        watched(iterate)
        barrier.abort()
        for thread in convoy_threads():
            thread.join(10)
        assert not convoy_threads()
        with residency.editing():
            pass
        assert torch.equal(model(x), expected)
