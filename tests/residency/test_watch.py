"""A watch looks into a thread's code only where the processor's clock says that it stands still."""

from __future__ import annotations

import itertools
import threading

import pytest

from lading.residency import watch as watch_module
from lading.residency.watch import Watch


@pytest.mark.parametrize("computes", [True, False])
def test_a_watch_asks_for_the_frames_of_a_thread_only_when_it_does_not_compute(monkeypatch, computes):
    asked = []
    ticks = itertools.count() if computes else itertools.repeat(7)
    monkeypatch.setattr(watch_module, "_processor_ticks", lambda _: next(ticks))
    monkeypatch.setattr(watch_module, "frame_of", asked.append)
    watch = Watch(1e-9)
    for _ in range(100):
        assert watch.look(threading.current_thread()) is None
    assert bool(asked) is not computes


def test_a_watch_of_a_thread_that_ended_says_nothing():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    watch = Watch(1e-9)
    assert [watch.look(thread) for _ in range(3)] == [None, None, None]
