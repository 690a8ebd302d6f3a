"""Convoys that a user interrupts: at any moment, at any line of the leader, once and again."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
from pathlib import Path

import pytest
from acting import Acting, check_restored, inputs
from chain import seeded

import lading
from lading.residency import crew as crew_module


@pytest.fixture
def model():
    return seeded(Acting())


@pytest.mark.parametrize("moment", ["a member computes", "between outputs", "in the source"])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_an_interruption_ends_the_threads_and_restores_the_residency(model, moment, count):
    num = 0

    def interrupt_at(here: str) -> None:
        nonlocal num
        num += here == moment
        if here == moment and num == count:
            signal.raise_signal(signal.SIGINT)

    def source():
        for batch in inputs(13):
            interrupt_at("in the source")
            yield batch

    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(5)]
        model.act = lambda x, place: interrupt_at("a member computes")
        outputs = lading.convoy(model, source(), width=3)

        def iterate() -> None:
            for _ in outputs:
                interrupt_at("between outputs")

        with pytest.raises(KeyboardInterrupt):
            iterate()
        if moment == "between outputs":
            outputs.close()
        check_restored(model, residency, expected)


_OURS = tuple(
    str(Path(crew_module.__file__).with_name(name)) for name in ("convoy.py", "crew.py", "members.py", "ambience.py")
)


def _is_ours(code) -> bool:
    return code.co_filename in _OURS and code.co_name not in ("_claim", "_leave")  # dropping it helps there


def _at_line(line: int, function) -> int:
    """Raise KeyboardInterrupt at the given line of the convoy's own code in this thread; give how many lines ran."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(lambda frame, event, argument: trace if _is_ours(frame.f_code) else None)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.full), 41])
def test_an_interruption_at_any_line_of_the_leader_restores_the_residency(model, share, monkeypatch):
    monkeypatch.setattr(crew_module, "_LOOK_S", 0.01)
    with lading.offload(model, {"": "disk"}) as residency:
        expected = [model(batch) for batch in inputs(3)]

        def run() -> None:
            with lading.convoy(model, inputs(3), width=2) as outputs:
                for _ in outputs:
                    pass

        num_lines = _at_line(-1, run)
        assert num_lines > 100
        for line in range(1, num_lines, share):
            with contextlib.suppress(KeyboardInterrupt):
                assert _at_line(line, run) < line, "somebody swallowed it"  # some runs have fewer lines than others
            gc.collect()
            check_restored(model, residency, expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file that was being opened
@pytest.mark.full  # by the clock: no two runs are the same
@pytest.mark.parametrize("count", [1000])
@pytest.mark.parametrize("num_signals", [1, 2])
def test_an_interruption_at_any_time_restores_the_residency(model, count, num_signals, monkeypatch):
    """Signals come when they come, also while the first one is served. Closing, or dropping it, ends what is left."""
    monkeypatch.setattr(crew_module, "_LOOK_S", 0.05)
    chance = random.Random(num_signals)
    left = 0

    def interrupt(_: int, frame) -> None:
        nonlocal left
        while frame is not None and frame.f_code is not cross.__code__:
            frame = frame.f_back
        if left and frame is not None:  # inside what is under test
            left -= 1
            raise KeyboardInterrupt

    def cross() -> None:
        nonlocal left
        with lading.convoy(model, inputs(9), width=4) as outputs:
            left = num_signals
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 0.02), 2e-4)
            for _ in outputs:
                pass

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with lading.offload(model, {"": "disk"}) as residency:
            expected = [model(batch) for batch in inputs(3)]
            for _ in range(count):
                with contextlib.suppress(KeyboardInterrupt):
                    cross()
                left = 0
                gc.collect()
                check_restored(model, residency, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
