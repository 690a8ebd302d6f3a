"""The schedule alone, over a mover that moves nothing: capacity, progress, failures, orders, edits, closing, forks."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_mover import FakeMover, make_schedule
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from crowd import PATIENCE_S, run_together
from lading.errors import ResidencyError
from lading.residency import choice, ledger, visits, worker
from lading.residency import schedule as schedule_module
from lading.residency.forks import Forks
from lading.residency.moving import State
from lading.residency.schedule import Schedule
from lading.residency.visits import Visit


class OopsError(Exception):
    """What a fake fetch or a forward raises."""


@contextmanager
def visiting(schedule: Schedule, door: object = "root", blocks: range | None = None) -> Iterator[Visit]:
    """Stand for what the hooks of a root module do; the order is learned where nothing is raised."""
    visit = schedule.begin(door, frozenset(blocks if blocks is not None else range(len(schedule._ledger.sizes))))
    is_complete = False
    try:
        yield visit
        is_complete = True
    finally:
        schedule.end(visit, is_complete=is_complete)


@contextmanager
def inside(schedule: Schedule, visit: Visit, block: int) -> Iterator[None]:
    """Stand for what the hooks of a block do."""
    schedule.enter(visit, block)
    try:
        yield
    finally:
        schedule.leave(visit, block)


def settle(schedule: Schedule) -> None:
    """Wait until nobody is inside and nothing moves."""
    with schedule.editing():
        pass


def check_idle(schedule: Schedule, mover: FakeMover, room: object) -> None:
    """Nothing is held when nobody is inside: no lease, ticket, visit or loan; room and states tell the same."""
    settle(schedule)
    assert mover.wrong == []
    assert not mover.inside
    assert not any(schedule._ledger.leases)
    assert not schedule._ledger.tickets
    assert not schedule._ledger.visits
    assert room.lent_bytes == 0
    if mover.makes_copies:  # a stale copy is forgotten by the schedule alone
        mover.present &= {block for block, state in enumerate(schedule._ledger.states) if state is State.RESIDENT}
    assert {block for block, state in enumerate(schedule._ledger.states) if state is State.RESIDENT} == mover.present
    assert set(schedule._ledger.states) <= {State.RESIDENT, State.ABSENT}
    used = sum(mover.sizes[block] for block in mover.present)
    assert room.used_bytes == used + room.kept_bytes
    assert schedule.counts.peak_bytes <= mover.capacity


# Programs ------------------------------------------------------------------------------------------------------------

step = st.deferred(
    lambda: st.tuples(
        st.integers(0, 5), st.sampled_from(["pass", "pass", "pass", "raise", "borrow"]), st.lists(step, max_size=2)
    )
)
program = st.lists(st.lists(step, max_size=6), min_size=1, max_size=4)


def follow(schedule: Schedule, mover: FakeMover, visit: Visit, steps: list) -> None:
    for number, what, below in steps:
        block = number % len(mover.sizes)
        with inside(schedule, visit, block):
            mover._check(block in mover.inside, f"{block} is not there inside")
            follow(schedule, mover, visit, below)
            mover._check(block in mover.inside, f"{block} did not come back after what it contains")
            if what == "borrow":
                schedule.borrow(visit, min(2, mover.capacity))
                schedule.give_back(visit, min(2, mover.capacity))
                mover._check(block in mover.inside, f"{block} did not come back after a loan")
            if what == "raise":
                raise OopsError


def run_program(schedule: Schedule, mover: FakeMover, visits: list) -> None:
    for steps in visits:
        with contextlib.suppress(OopsError), visiting(schedule) as visit:
            follow(schedule, mover, visit, steps)


@settings(max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    spare=st.integers(0, 10),
    programs=st.lists(program, min_size=1, max_size=4),
    makes_copies=st.booleans(),
    failing=st.sets(st.integers(1, 12)),
)
def test_any_threads_go_through_within_capacity(sizes, spare, programs, makes_copies, failing):
    schedule, mover, room = make_schedule(sizes, max(sizes) + spare, makes_copies=makes_copies)
    calls = iter(range(1, 1 << 30))

    def fail_now_and_then(block: int) -> None:
        if next(calls) in failing:
            raise OopsError(block)

    mover.on_fetch = fail_now_and_then
    raised = run_together([lambda visits=visits: run_program(schedule, mover, visits) for visits in programs])
    assert raised == []
    check_idle(schedule, mover, room)
    mover.on_fetch = lambda block: None
    run_program(schedule, mover, [[(block, "pass", []) for block in range(len(sizes))]])
    check_idle(schedule, mover, room)
    schedule.close()
    schedule.close()


def test_a_block_is_fetched_once_for_all_who_are_inside():
    schedule, mover, room = make_schedule([1, 1, 1], 1)
    together = threading.Barrier(8)

    def forward() -> None:
        with visiting(schedule) as visit:
            for block in range(3):
                with inside(schedule, visit, block):
                    together.wait(PATIENCE_S)

    assert run_together([forward] * 8) == []
    assert mover.fetched == {0: 1, 1: 1, 2: 1}
    check_idle(schedule, mover, room)
    schedule.close()


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_failing_fetch_reaches_every_waiter_and_the_next_entry_tries_again():
    schedule, mover, room = make_schedule([1], 1, planned=[])
    all_wait = threading.Event()
    failures = []

    def fail(block: int) -> None:
        assert all_wait.wait(PATIENCE_S)
        failures.append(OopsError("disk"))
        raise failures[-1]

    def forward() -> None:
        with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 0):
            pass

    def open_when_all_wait() -> None:
        with schedule._lock:
            schedule._change.wait_for(lambda: len(schedule._ledger.tickets) == 4, PATIENCE_S)
        all_wait.set()

    def watched_wake(wake: Callable[[], None] = schedule._wake) -> None:
        schedule._change.notify_all()
        wake()

    schedule._wake = watched_wake
    mover.on_fetch = fail
    raised = run_together([forward] * 4 + [open_when_all_wait])
    assert [type(error) for error in raised] == [OopsError] * 4
    assert len(failures) == 1
    assert {id(error) for error in raised} == {id(failures[0])}
    check_idle(schedule, mover, room)
    mover.on_fetch = lambda block: None
    forward()
    assert mover.fetched[0] == 1
    schedule.close()


def test_a_failure_while_fetching_ahead_is_told_to_who_enters_and_to_nobody_else():
    schedule, mover, room = make_schedule([1, 1, 1], 3)
    failed = threading.Event()

    def fail(block: int) -> None:
        if block == 1:
            failed.set()
            raise OopsError

    mover.on_fetch = fail
    with visiting(schedule) as visit:
        with inside(schedule, visit, 0):
            assert failed.wait(PATIENCE_S)
        with inside(schedule, visit, 2):
            pass
        with pytest.raises(OopsError):
            schedule.enter(visit, 1)
    check_idle(schedule, mover, room)
    schedule.close()


def test_an_outer_block_that_does_not_come_back_is_not_left_twice():
    schedule, mover, room = make_schedule([2, 2], 2, planned=[])
    with visiting(schedule, blocks=range(0)) as visit:
        schedule.enter(visit, 0)
        schedule.enter(visit, 1)
        mover.on_fetch = lambda block: (_ for _ in ()).throw(OopsError())
        with pytest.raises(OopsError):
            schedule.leave(visit, 1)
        schedule.leave(visit, 0)
    check_idle(schedule, mover, room)
    mover.on_fetch = lambda block: None
    run_program(schedule, mover, [[(0, "pass", []), (1, "pass", [])]])
    check_idle(schedule, mover, room)
    schedule.close()


def test_a_failing_inner_block_gives_the_outer_one_back():
    schedule, mover, room = make_schedule([2, 2], 2, planned=[])
    mover.on_fetch = lambda block: (_ for _ in ()).throw(OopsError()) if block else None
    with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 0):
        with pytest.raises(OopsError):
            schedule.enter(visit, 1)
        assert mover.inside == {0}
    check_idle(schedule, mover, room)
    schedule.close()


def test_an_eviction_that_fails_keeps_its_bytes_counted_and_the_forward_is_refused_with_numbers(caplog):
    schedule, mover, room = make_schedule([2, 2], 2, planned=[])
    mover.on_evict = lambda block: (_ for _ in ()).throw(OopsError("locked"))
    with visiting(schedule, blocks=range(0)) as visit:
        with inside(schedule, visit, 0):
            pass
        with pytest.raises(ResidencyError, match=r"2 B of which edited weights hold 2 B, 2 B needed"):
            schedule.enter(visit, 1)
    assert room.used_bytes == 2
    assert "weights stay in memory: locked" in caplog.text
    schedule.close()


def test_edits_beyond_the_room_are_refused_with_numbers_before_a_fetch():
    schedule, mover, room = make_schedule([4, 4], 6, planned=[])
    mover.on_begin = lambda: room.keep(0, 3)
    with visiting(schedule, blocks=range(0)) as visit:
        with pytest.raises(ResidencyError) as caught:
            schedule.enter(visit, 1)
        assert "found 6 B of which edited weights hold 3 B, 4 B needed at once" in str(caught.value)
        assert not mover.log
        with inside(schedule, visit, 0):  # its own edits take no room beside it
            assert room.used_bytes == 4
    schedule.close()


def test_a_fetch_that_fails_leaves_edits_counted():
    schedule, mover, room = make_schedule([4], 6, planned=[])
    mover.on_begin = lambda: room.keep(0, 3)
    mover.on_fetch = lambda block: (_ for _ in ()).throw(OopsError())
    with visiting(schedule, blocks=range(0)) as visit, pytest.raises(OopsError):
        schedule.enter(visit, 0)
    assert (room.used_bytes, room.kept_bytes) == (3, 3)
    schedule.close()


def test_edits_found_while_a_block_is_in_are_not_counted_twice():
    schedule, mover, room = make_schedule([4], 6, planned=[])
    mover.on_begin = lambda: room.keep(0, 3)
    mover.kept[0] = 3
    for _ in range(3):
        run_program(schedule, mover, [[(0, "pass", [])]])
        assert (room.used_bytes, room.kept_bytes) == (4, 0)
    schedule.close()


def test_a_loan_larger_than_the_room_is_refused():
    schedule, mover, room = make_schedule([4], 6, planned=[])
    with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 0):
        with pytest.raises(ResidencyError, match="7 B needed at once"):
            schedule.borrow(visit, 7)
        assert mover.inside == {0}
    check_idle(schedule, mover, room)
    schedule.close()


# When blocks go ------------------------------------------------------------------------------------------------------


def test_evictions_end_before_the_outermost_forward_returns():
    schedule, mover, _room = make_schedule([1, 1, 1], 1)
    is_inside = threading.Event()
    evicting, go_on = threading.Event(), threading.Event()
    returned = []

    def hold(block: int) -> None:
        assert is_inside.is_set(), "evicted between forwards"
        evicting.set()
        assert go_on.wait(PATIENCE_S)
        assert not returned

    mover.on_evict = hold

    def forward() -> None:
        is_inside.set()
        with visiting(schedule) as visit:
            schedule.enter(visit, 0)
            schedule.leave(visit, 0)  # block 0 makes way for 1, ahead
            assert evicting.wait(PATIENCE_S)
            release.start()
        returned.append(True)
        is_inside.clear()

    release = threading.Thread(target=go_on.set)
    forward()
    assert returned
    assert mover.wrong == []
    schedule.close()


def test_a_visit_does_not_begin_while_an_eviction_runs():
    """What is counted at the beginning would be counted again when the eviction ends."""
    schedule, mover, _ = make_schedule([1, 1], 1)
    evicting, go_on = threading.Event(), threading.Event()
    begun_while = []
    mover.on_begin = lambda: begun_while.append(State.EVICTING in schedule._ledger.states)
    mover.on_evict = lambda block: (evicting.set(), go_on.wait(PATIENCE_S))

    def first() -> None:
        with visiting(schedule) as visit:
            schedule.enter(visit, 0)
            schedule.leave(visit, 0)
            assert evicting.wait(PATIENCE_S)

    def second() -> None:
        assert evicting.wait(PATIENCE_S)
        with schedule._lock:
            schedule._change.wait_for(lambda: not schedule._ledger.visits, PATIENCE_S)
        threading.Thread(target=go_on.set).start()
        with visiting(schedule):
            pass

    assert run_together([first, second]) == []
    assert begun_while == [False, False]
    schedule.close()


def test_the_order_is_learned_and_corrected():
    schedule, mover, room = make_schedule([1, 1, 1, 1], 2, planned=[0, 1, 2, 3])
    for order in ([3, 1, 0, 2], [0, 3, 3, 1], [2]):
        steps = [(block, "pass", []) for block in order]
        run_program(schedule, mover, [steps])
        assert schedule._orders.learned["root"] == tuple(order)
        with visiting(schedule) as visit:
            assert visit.expected == tuple(order)
            follow(schedule, mover, visit, steps)
    with contextlib.suppress(OopsError), visiting(schedule) as visit:
        follow(schedule, mover, visit, [(1, "raise", [])])
    assert schedule._orders.learned["root"] == (2,), "what did not go through teaches nothing"
    check_idle(schedule, mover, room)
    schedule.close()


def test_what_comes_next_is_fetched_ahead_and_what_stays_is_a_fixed_set():
    schedule, mover, _ = make_schedule([1] * 6, 3)
    steps = [(block, "pass", []) for block in range(6)]
    run_program(schedule, mover, [steps] * 3)
    settle(schedule)
    mover.log.clear()
    fetches = schedule.counts.fetches
    run_program(schedule, mover, [steps] * 4)
    settle(schedule)
    assert schedule.counts.fetches - fetches <= 4 * 5, "the cycle defeats the room: every block was fetched each time"
    with visiting(schedule) as visit:
        fetched = threading.Event()
        mover.on_fetch = lambda block: fetched.set()
        with inside(schedule, visit, 0):
            assert fetched.wait(PATIENCE_S), "nothing was fetched ahead while somebody was inside"
    schedule.close()


def test_a_thread_that_holds_a_block_makes_way_in_time_for_another():
    schedule, mover, _ = make_schedule([1, 1], 1, planned=[])
    entered = threading.Event()

    def first() -> None:
        with visiting(schedule, blocks=range(0)) as visit:
            with inside(schedule, visit, 0):
                entered.set()
                with schedule._lock:
                    schedule._change.wait_for(lambda: schedule._ledger.tickets, 1)
            with inside(schedule, visit, 0):
                pass

    def second() -> None:
        assert entered.wait(PATIENCE_S)
        with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 1):
            pass

    assert run_together([first, second]) == []
    assert mover.wrong == []
    schedule.close()


# Between forwards ----------------------------------------------------------------------------------------------------


def test_editing_waits_for_who_is_inside_and_keeps_others_out():
    schedule, mover, room = make_schedule([1, 1], 1)
    events: list[str] = []
    entered, editor_waits = threading.Event(), threading.Event()

    def forward() -> None:
        with visiting(schedule) as visit:
            with inside(schedule, visit, 0):
                entered.set()
                assert editor_waits.wait(PATIENCE_S)
            with inside(schedule, visit, 1):
                events.append("forward")

    def edit() -> None:
        assert entered.wait(PATIENCE_S)
        drain = schedule._drain

        def drain_loudly() -> None:
            editor_waits.set()
            drain()

        schedule._drain = drain_loudly
        with schedule.editing():
            late.start()
            assert not schedule._ledger.visits
            events.append("edit")
        late.join(PATIENCE_S)

    def come_late() -> None:
        with visiting(schedule):
            events.append("late")

    late = threading.Thread(target=come_late)
    assert run_together([forward, edit]) == []
    assert events == ["forward", "edit", "late"]
    check_idle(schedule, mover, room)
    schedule.close()


def test_a_forward_inside_editing_in_one_thread_is_refused_and_does_not_wait_for_itself():
    schedule, _, _ = make_schedule([1], 1)
    with schedule.editing(), pytest.raises(ResidencyError, match=r"editing\(\) around it, in this thread"):
        schedule.begin("root", frozenset())
    run_program(schedule, schedule._mover, [[(0, "pass", [])]])
    schedule.close()


def test_editing_that_is_interrupted_keeps_nobody_out():
    schedule, mover, _ = make_schedule([1], 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    drain, schedule._drain = schedule._drain, interrupt
    with pytest.raises(KeyboardInterrupt), schedule.editing():
        pass
    schedule._drain = drain
    run_program(schedule, mover, [[(0, "pass", [])]])
    schedule.close()


def test_close_waits_for_forwards_in_flight_which_go_on_to_be_served():
    schedule, mover, room = make_schedule([1, 1], 1, planned=[])
    entered, closing = threading.Event(), threading.Event()
    events, workers = [], []
    drain = schedule._drain

    def drain_loudly() -> None:
        closing.set()
        drain()

    schedule._drain = drain_loudly

    def forward() -> None:
        with visiting(schedule, blocks=range(0)) as visit:
            with inside(schedule, visit, 0):
                entered.set()
                workers.append(schedule._worker.thread)
                assert closing.wait(PATIENCE_S)
            with inside(schedule, visit, 1):  # has to be fetched while the schedule closes
                events.append("forward")

    def close() -> None:
        assert entered.wait(PATIENCE_S)
        schedule.close()
        events.append("closed")

    assert run_together([forward, close, close]) == []
    assert events == ["forward", "closed", "closed"]
    assert mover.wrong == []
    assert all(not worker.is_alive() for worker in workers)
    with pytest.raises(ResidencyError, match="its residency closed"):
        schedule.begin("root", frozenset())
    del room


def test_close_that_is_interrupted_leaves_it_open():
    schedule, mover, _ = make_schedule([1], 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    drain, schedule._drain = schedule._drain, interrupt
    with pytest.raises(KeyboardInterrupt):
        schedule.close()
    schedule._drain = drain
    run_program(schedule, mover, [[(0, "pass", [])]])
    schedule.close()


def test_without_a_thread_to_be_had_whoever_waits_fetches(monkeypatch, caplog):
    schedule, mover, room = make_schedule([1, 1, 1], 1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        run_program(schedule, mover, [[(0, "pass", [(2, "borrow", [])]), (1, "pass", [])]])
    assert "blocks are not fetched ahead: can't start new thread" in caplog.text
    forward = [[(block, "pass", []) for block in range(3)]] * 5
    assert run_together([lambda: run_program(schedule, mover, forward)] * 4) == []
    check_idle(schedule, mover, room)
    schedule.close()


# Interruptions -------------------------------------------------------------------------------------------------------


def test_an_interrupted_fetch_of_a_thread_that_fetches_by_itself_leaves_the_block_absent():
    schedule, mover, room = make_schedule([1], 1)
    schedule._worker.can_run = False

    def interrupt(block: int) -> None:
        raise KeyboardInterrupt

    mover.on_fetch = interrupt
    with pytest.raises(KeyboardInterrupt), visiting(schedule) as visit:
        schedule.enter(visit, 0)
    assert schedule._ledger.states == [State.ABSENT]
    mover.on_fetch = lambda block: None
    run_program(schedule, mover, [[(0, "pass", [])]])
    check_idle(schedule, mover, room)
    schedule.close()


def test_who_waits_ends_the_visits_of_threads_that_are_in_no_forward_any_more():
    schedule, mover, room = make_schedule([1, 1], 1, planned=[])
    left_over = schedule.begin("root", frozenset())
    schedule.enter(left_over, 0)
    schedule.is_inside = lambda thread_id: thread_id != left_over.thread_id

    def forward() -> None:
        with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 1):
            pass

    assert run_together([forward]) == []
    assert left_over.is_over
    check_idle(schedule, mover, room)
    schedule.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_thread_interrupted_anywhere_leaves_states_right(seed):
    schedule, mover, room = make_schedule([1, 2, 1, 2], 3)
    chance = random.Random(seed)
    mine = frozenset({0, 1, 2, 3})
    steps = [(0, "pass", []), (1, "borrow", [(2, "pass", [])]), (3, "pass", [])]

    class Interrupted(BaseException):
        pass

    def forward_repaired() -> None:
        visit = None
        try:
            visit = schedule.begin("root", mine)
            follow(schedule, mover, visit, steps)
            schedule.end(visit, is_complete=True)
        except Interrupted:
            schedule.repair(None)

    def work() -> None:
        for _ in range(60):
            run_program(schedule, mover, [steps])

    lines = count_lines(lambda: run_program(schedule, mover, [steps]))
    others = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in others:
        thread.start()
    for _ in range(40):
        with interrupting(chance.randrange(lines), Interrupted):
            forward_repaired()
        schedule.repair(None)
    for thread in others:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    mover.wrong = [what for what in mover.wrong if not what.startswith(("joined", "left"))]
    run_program(schedule, mover, [steps])
    check_idle(schedule, mover, room)
    schedule.close()


_OURS = (choice, ledger, schedule_module, visits, worker)  # what runs under the schedule's lock


def _is_ours(frame: object) -> bool:
    return frame.f_code.co_filename in {module.__file__ for module in _OURS}


def _lines_without_locks() -> frozenset[tuple[str, int]]:
    """Leave out `with` and `try`: a trace raises there between lock and body, where no signal handler runs."""
    return frozenset(
        (module.__file__, number)
        for module in _OURS
        for number, line in enumerate(Path(module.__file__).read_text(encoding="utf-8").splitlines(), 1)
        if "with self._lock" not in line and "try:" not in line
    )


def count_lines(function: Callable[[], object]) -> int:
    count = 0
    allowed = _lines_without_locks()

    def trace(frame, event, _):
        nonlocal count
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) in allowed:
            count += 1
        return trace

    sys.settrace(lambda frame, event, argument: trace if _is_ours(frame) else None)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


@contextmanager
def interrupting(line: int, kind: type[BaseException]) -> Iterator[None]:
    """Raise at the given line that this thread comes to in the schedule."""
    left = line
    allowed = _lines_without_locks()

    def trace(frame, event, _):
        nonlocal left
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) in allowed:
            left -= 1
            if left == -1:
                sys.settrace(None)
                raise kind
        return trace

    sys.settrace(lambda frame, event, argument: trace if _is_ours(frame) else None)
    try:
        yield
    finally:
        sys.settrace(None)


def test_a_thread_that_waits_can_be_interrupted_from_outside():
    schedule, mover, room = make_schedule([1, 1], 1, planned=[])
    go_on, waiting = threading.Event(), threading.Event()
    mover.on_fetch = lambda block: (waiting.set(), go_on.wait(PATIENCE_S)) if block else None
    raised = []

    def forward() -> None:
        try:
            with visiting(schedule, blocks=range(0)) as visit, inside(schedule, visit, 1):
                pass
        except KeyboardInterrupt as error:
            raised.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    assert waiting.wait(PATIENCE_S)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    go_on.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert raised
    check_idle(schedule, mover, room)
    run_program(schedule, mover, [[(1, "pass", []), (0, "pass", [])]])
    check_idle(schedule, mover, room)
    schedule.close()


# Forks ---------------------------------------------------------------------------------------------------------------


def test_threads_that_fork_at_once_block_nothing(monkeypatch):
    """The handlers of two forks may interleave: each must release what it acquired."""
    forks = Forks()
    schedules = [make_schedule([1], 1)[0] for _ in range(3)]
    for schedule in schedules:
        forks._live.add(schedule)

    def fork() -> None:
        for _ in range(50):
            forks._before()
            forks._in_parent()

    assert run_together([fork] * 4) == []
    for schedule in schedules:
        assert schedule._lock.acquire(timeout=5)
        schedule._lock.release()
        schedule.close()


def test_a_child_goes_on_alone_with_what_its_own_thread_was_inside_of():
    """What a fork does to a schedule, without a fork: other threads and their visits are gone."""
    schedule, mover, room = make_schedule([1, 1, 1], 2, planned=[])
    others = []

    def other() -> None:
        others.append(schedule.begin("root", frozenset()))
        schedule.enter(others[0], 1)

    with visiting(schedule, blocks=range(0)) as visit:
        with inside(schedule, visit, 0):
            assert run_together([other]) == []
            mover.present.discard(1)
            schedule._worker._wakes.put(False)
            schedule._worker.thread.join(PATIENCE_S)
            schedule.restart_in_child()
            assert mover.inside == {0}
            with inside(schedule, visit, 2):
                pass
            assert mover.inside == {0}
        with inside(schedule, visit, 1):
            pass
    assert schedule._worker.thread is None
    check_idle(schedule, mover, room)
    run_program(schedule, mover, [[(block, "pass", []) for block in range(3)]] * 2)
    check_idle(schedule, mover, room)
    schedule.close()
