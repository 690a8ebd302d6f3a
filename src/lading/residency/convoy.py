"""Give the outputs of batches in order while they cross a model together, or one by one where nothing streams.

The iterator's caller leads the crew: its own code runs while every micro-batch waits, and batches are taken in only as
far as a crossing needs. An error belongs to its batch: the others go on.

Concurrency: one thread iterates and closes; another one is refused while it does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch

from lading.errors import ResidencyError, refusal
from lading.residency.ambience import Luggage
from lading.residency.crew import Crew, Crossings
from lading.residency.members import Job
from lading.residency.refusals import forward_after_close
from lading.residency.width import ConvoyStats

_NO_MORE = object()


class Convoy(Iterator[Any]):
    """Give the outputs of batches that cross a model together, in their order: what `lading.convoy` returns.

    Iterate and close it in one thread; while it is under way, the model counts as being inside a forward. A context
    manager, which closes it.

    Args:
        crew: None where nothing streams.
        batches: whatever `crossings` calls.
        crossings: what is done with each.
        devices: accelerators with random generators of their own.
        returns_errors: whether an exception of a batch is its output, instead of raised.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> with lading.offload(net, {"": "disk"}), lading.convoy(net, iter(torch.ones(6, 1, 64)), width=3) as outputs:
        ...     first = next(outputs)
        ...     outputs.stats().width, first.shape
        (0, torch.Size([1, 64]))
    """

    def __init__(
        self,
        crew: Crew | None,
        batches: Iterable[Any],
        crossings: Crossings,
        devices: Sequence[torch.device],
        *,
        returns_errors: bool,
    ) -> None:
        self._crew = crew
        self._batches = iter(batches)
        self._crossings = crossings
        self._devices = devices
        self._run_s = 0.0
        self._returns_errors = returns_errors
        self._num_taken = 0
        self._source_error: BaseException | None = None
        self._is_closed = self._is_dismissed = False
        self._users: list[int] = []
        """Threads that are at it: no lock, which an interruption could leave taken."""
        self._process = os.getpid()
        if crew is not None:
            self._finalizer = weakref.finalize(self, crew.abandon)
            self._finalizer.atexit = False

    def __iter__(self) -> Convoy:
        return self

    def __next__(self) -> Any:
        try:
            self._claim()
            if self._is_closed:
                raise ResidencyError(
                    refusal("a convoy", found="it was closed", expected="an open one", way_out="call lading.convoy")
                )
            try:
                job = self._plain() if self._crew is None else self._next(self._crew)
            except BaseException:
                if self._crew is not None:
                    self._close()
                raise
        finally:
            self._leave()
        if job is None:
            self._raise_of_source()
            raise StopIteration
        return self._handed_out(job)

    def _handed_out(self, job: Job) -> Any:
        error = job.error
        if error is None:
            return job.output
        if self._returns_errors and isinstance(error, Exception):
            return error
        try:
            if isinstance(error, StopIteration):  # it would end the iteration, as in a generator
                raise RuntimeError(f"batch {job.index} raised StopIteration") from error  # noqa: TRY004
            raise error
        finally:
            del error, job  # the error's frames hold these, and would hold it

    def _next(self, crew: Crew) -> Job | None:
        while crew.next_index not in crew.done:
            if crew.wants_more:
                self._take_aboard(crew)
            elif not crew.is_empty:
                crew.go_on()
            else:
                crew.end()
                return None
        job = crew.done.pop(crew.next_index)
        crew.next_index += 1
        return job

    def _take_aboard(self, crew: Crew) -> None:
        try:
            batch = next(self._batches)
        except StopIteration:
            crew.may_board = False
        except Exception as error:  # noqa: BLE001 - raised after the outputs of the batches before
            crew.may_board, self._source_error = False, error
        else:
            crew.board(self._num_taken, batch)
            self._num_taken += 1

    def _raise_of_source(self) -> None:
        error, self._source_error = self._source_error, None
        if error is not None:
            raise error

    def _plain(self) -> Job | None:
        batch = next(self._batches, _NO_MORE)
        if batch is _NO_MORE:
            return None
        job = Job(index=self._num_taken, call=partial(self._crossings.call, batch), seed=0)
        self._num_taken += 1
        luggage = Luggage(self._devices)
        began = time.perf_counter()
        try:
            torch.manual_seed(self._crossings.seeds(job.index))
            job.output = job.call()
        except Exception as error:  # noqa: BLE001 - the caller's to raise
            job.error = error
        finally:
            luggage.unpack()
        self._run_s += time.perf_counter() - began
        return job

    def stats(self) -> ConvoyStats:
        """Say what happened so far: a snapshot."""
        if self._crew is not None:
            return self._crew.stats()
        return ConvoyStats(
            batches=self._num_taken,
            crossings=0,
            width=1,
            run_s=self._run_s,
            wait_s=0.0,
            fetched_bytes=0,
            bound="compute",
            limited_by="resident",
        )

    def close(self) -> None:
        """Have micro-batches under way leave the model, end their threads. Twice is fine; also in a forked child."""
        if self._process != os.getpid():
            return
        try:
            self._claim()
            self._close()
        finally:
            self._leave()

    def dismiss(self) -> None:
        """End threads that wait for a crossing which the end of the residency leaves no place for."""
        self._is_dismissed = True
        try:
            with suppress(ResidencyError):  # who iterates meanwhile is refused, and ends them
                self._claim()
                if self._crew is not None:
                    self._crew.dismiss()
        finally:
            self._leave()

    def _close(self) -> None:
        if not self._is_closed and self._crew is not None and self._process == os.getpid():
            self._crew.end()
            self._finalizer.detach()
        self._is_closed = True

    @property
    def is_led_here(self) -> bool:
        """Say whether the calling thread has micro-batches of it waiting inside the model."""
        return self._crew is not None and self._crew.leader_id == threading.get_ident()

    def _claim(self) -> None:
        """Note that this thread uses it; the first in the list does, and whoever claims takes itself off again."""
        me = threading.get_ident()
        self._users.append(me)
        if len(self._users) > 1 and {*self._users} == {me} and self._num_calls_here() == 1:
            self._users[:] = [me]  # an interruption kept an earlier call from taking itself off
        if self._process == os.getpid() and len(self._users) == 1:
            return
        if self._is_dismissed:
            raise forward_after_close()
        raise ResidencyError(
            refusal(
                "a convoy",
                found="it is used by several threads or processes, or by one of its own calls",
                expected="one thread that iterates",
                way_out="make another convoy",
            )
        )

    def _num_calls_here(self) -> int:
        """Count the calls of this convoy that this thread is inside of."""
        calls = (Convoy.__next__.__code__, Convoy.close.__code__, Convoy.dismiss.__code__)
        frame: FrameType | None = sys._getframe()
        count = 0
        while frame is not None:
            count += frame.f_code in calls and frame.f_locals.get("self") is self
            frame = frame.f_back
        return count

    def _leave(self) -> None:
        with suppress(ValueError):  # an interruption came before the claim
            self._users.remove(threading.get_ident())

    def __enter__(self) -> Convoy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
