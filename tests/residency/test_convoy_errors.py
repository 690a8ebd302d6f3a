"""Convoys that do not go through: errors of batches and sources, closing and dropping at any moment."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from acting import Acting, OopsError, check_restored, inputs
from chain import seeded
from laws import traces
from party import convoy_threads

import lading
from crowd import PATIENCE_S


@pytest.fixture
def model():
    return seeded(Acting())


# Wrong arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"width": True},
        {"width": "wide"},
        {"function": "forward"},
        {"seed": "dice"},
        {"seed": 0.5},
        {"seed": 1 << 64},
        {"on_error": "ignore"},
        {"patience_s": "long"},
        {"patience_s": 0},
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused_before_anything_is_called(model, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(
        lading.ResidencyError, match=rf"^lading\.convoy: found {name}={value!r} · expected .* · give one"
    ):
        lading.convoy(model, inputs(2), **wrong)


# Errors of batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "return"])
@pytest.mark.parametrize("place", range(7))
def test_an_error_belongs_to_its_batch_and_the_others_go_on(model, place, on_error):
    expected = [model(batch) for batch in inputs(7)]
    bad = {1, 4}

    def act(x: torch.Tensor, here: int) -> None:
        if here == place and threading.current_thread().name == "lading-convoy" and int(number.get(id_of())) in bad:
            raise OopsError(number[id_of()])

    number: dict[int, int] = {}
    id_of = threading.get_ident

    def call(pair: tuple[int, torch.Tensor]) -> torch.Tensor:
        number[id_of()] = pair[0]
        return model(pair[1])

    model.act = act
    with lading.offload(model, {"": "disk"}) as residency:
        outputs = lading.convoy(model, enumerate(inputs(7)), function=call, width=3, on_error=on_error)
        for index in range(7):
            if index in bad and on_error == "raise":
                with pytest.raises(OopsError, match=str(index)):
                    next(outputs)
            elif index in bad:
                error = next(outputs)
                assert isinstance(error, OopsError)
                assert error.args == (index,)
            else:
                assert torch.equal(next(outputs), expected[index])
        assert list(outputs) == []
        check_restored(model, residency, expected)


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_a_batch_that_raises_stop_iteration_does_not_end_the_iteration(model, is_offloaded):
    def call(number: int) -> torch.Tensor:
        if number == 1:
            next(iter(()))
        return model(inputs(4)[number])

    def run() -> None:
        outputs = lading.convoy(model, range(4), function=call, width=2)
        next(outputs)
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(outputs)
        assert len(list(outputs)) == 2

    if is_offloaded:
        with lading.offload(model, {"": "disk"}):
            run()
    else:
        run()


def test_a_batch_that_the_model_does_not_take_is_an_error_of_its_own(model):
    batches = [inputs(1)[0], torch.ones(1, 3), {"x": inputs(1)[0]}, (inputs(1)[0],), "text"]
    with lading.offload(model, {"": "disk"}):
        found = list(lading.convoy(model, batches, width=3, on_error="return"))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])
    assert isinstance(found[1], RuntimeError)
    assert isinstance(found[4], lading.ResidencyError)
    assert "a batch: found str" in str(found[4])


@pytest.mark.parametrize("is_offloaded", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_an_error_of_the_source_comes_after_the_outputs_before(model, count, is_offloaded):
    expected = [model(batch) for batch in inputs(count)]

    def source():
        yield from inputs(count)
        raise OopsError("source")

    def run() -> None:
        outputs = lading.convoy(model, source(), width=3)
        assert all(torch.equal(next(outputs), output) for output in expected)
        with pytest.raises(OopsError, match="source"):
            next(outputs)
        assert list(outputs) == []

    if is_offloaded:
        with lading.offload(model, {"": "disk"}) as residency:
            run()
            check_restored(model, residency, expected)
    else:
        run()


def test_an_exit_in_a_batch_is_raised_also_where_errors_are_returned(model):
    def call(number: int) -> int:
        model(inputs(1)[0])
        if number == 1:
            sys.exit("enough")
        return number

    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(2)]
        outputs = lading.convoy(model, range(4), function=call, width=2, on_error="return")
        assert next(outputs) == 0
        with pytest.raises(SystemExit):
            next(outputs)
        outputs.close()
        check_restored(model, residency, expected)


def test_a_fetch_that_fails_is_an_error_of_its_batches_alone(model, monkeypatch):
    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(4)]
        mover = residency._parts._mover
        fetch = mover.fetch
        monkeypatch.setattr(
            mover, "fetch", lambda block: (_ for _ in ()).throw(OSError("disk")) if block == 3 else fetch(block)
        )
        found = list(lading.convoy(model, inputs(4), width=4, on_error="return"))
        assert [type(error) for error in found] == [OSError] * 4
        monkeypatch.undo()
        check_restored(model, residency, expected)


# Ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_taken", range(8))
def test_closing_after_any_output_leaves_nothing(model, num_taken):
    before = traces(model)
    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(7)]
        with lading.convoy(model, inputs(7), width=3) as outputs:
            found = [next(outputs) for _ in range(min(num_taken, 7))]
            if num_taken == 7:
                assert next(outputs, None) is None
        outputs.close()
        with pytest.raises(lading.ResidencyError, match="it was closed"):
            next(outputs)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=False))
        check_restored(model, residency, expected)
    assert traces(model) == before


def test_batches_that_have_not_begun_do_not_begin_when_it_closes(model):
    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(4)]
        model.num_begun = 0

        def act(x: torch.Tensor, place: int) -> None:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            while not outputs._crew.is_ending:
                time.sleep(0)

        model.act = act
        outputs = lading.convoy(model, inputs(4), width=4)
        with pytest.raises(KeyboardInterrupt):
            next(outputs)
        assert model.num_begun == 1
        check_restored(model, residency, expected)


@pytest.mark.parametrize("num_taken", [1, 2, 4])
def test_a_convoy_that_is_dropped_ends_by_itself(model, num_taken):
    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(7)]
        outputs = lading.convoy(model, inputs(7), width=3)
        for _ in range(num_taken):
            next(outputs)
        torch.manual_seed(8)
        following = torch.rand(3)
        torch.manual_seed(8)
        watched = weakref.ref(outputs)
        del outputs
        gc.collect()
        assert watched() is None
        for thread in convoy_threads():
            thread.join(10)
        assert torch.equal(torch.rand(3), following), "the caller's random state is another's"
        check_restored(model, residency, expected)


def test_outputs_and_batches_are_let_go_when_they_are_handed_out(model):
    watched = []

    def source():
        for batch in inputs(6):
            watched.append(weakref.ref(batch))
            yield batch

    with lading.offload(model, {"": "disk"}), lading.convoy(model, source(), width=3) as outputs:
        batch = None
        for output in outputs:
            watched.append(weakref.ref(output))
        del output, batch
        assert [reference() for reference in watched if reference() is not None] == []


def test_a_residency_that_closes_waits_for_the_crossing_and_the_next_one_is_refused(model):
    residency = lading.offload(model, {"": "disk"})
    outputs = lading.convoy(model, inputs(6), width=2)
    next(outputs)
    closer = threading.Thread(target=residency.close)
    closer.start()
    while not residency._parts.schedule._is_shut:
        pass
    next(outputs)
    with pytest.raises(lading.ResidencyError, match="its residency closed"):
        next(outputs)
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert not convoy_threads()


def test_who_iterates_while_the_residency_ends_its_threads_is_told_that_it_closed(model):
    with lading.offload(model, {"": "disk"}):
        outputs = lading.convoy(model, inputs(6), width=2)
        next(outputs), next(outputs)
        outputs._users.append(0)  # as the closing thread does
        outputs.dismiss()
        with pytest.raises(lading.ResidencyError, match="its residency closed"):
            next(outputs)
        outputs._users.remove(0)
        outputs.close()
    assert not convoy_threads()


def test_a_residency_that_closes_between_crossings_leaves_no_thread(model):
    with lading.offload(model, {"": "disk"}):
        outputs = lading.convoy(model, inputs(6), width=2)
        next(outputs), next(outputs)
        assert len(convoy_threads()) == 2
    assert not convoy_threads()
    with pytest.raises(lading.ResidencyError, match="its residency closed"):
        next(outputs)
