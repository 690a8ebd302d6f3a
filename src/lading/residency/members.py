"""Run micro-batches in threads of which one goes on at any moment: whoever has the baton.

A *member* is a thread that takes one micro-batch after the other; who made them takes part as their *leader*. A member
passes the baton on where it would enter a block, and when its micro-batch is done; what torch keeps for the whole
process travels with it. Knows no model and not who is next: that is `convoy`'s to say.

Guarantees that exactly one of leader and members runs, also between blocks, and that a member whose convoy ends leaves
its forward by an exception that no ``except Exception`` holds up.

Concurrency: everything here is touched by whoever has the baton, but for the locks through which it is passed.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch

from lading.residency.ambience import Luggage
from lading.residency.visits import Visit

_M_ARENA_MAX = -8


class Ended(BaseException):
    """Leave a forward whose convoy ends: no error of the model's."""


class Seat:
    """Wait for the baton, and keep what travels with it. The leader's, and each member's."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._turn = threading.Lock()
        self._turn.acquire()
        self.luggage = Luggage(devices)

    @property
    def is_called(self) -> bool:
        """Say whether the baton lies here and nobody has taken it up."""
        return not self._turn.locked()

    def call(self) -> None:
        """Give the baton to whoever waits here."""
        self._turn.release()

    def take(self, timeout_s: float = -1) -> bool:
        """Wait for the baton; say whether it came. What travels with it stays packed."""
        return self._turn.acquire(timeout=timeout_s)


@dataclass(slots=True)
class Timing:
    """Say how long one micro-batch took so far, in seconds. Outlives its output."""

    run_s: float = 0.0
    """How long it computed, waiting for turns and weights not counted."""
    first_block_s: float | None = None
    """Of that, from entering the first block until it would enter the next."""
    wait_s: float = 0.0
    """How long it waited for weights."""


@dataclass(slots=True, eq=False)
class Job:
    """Hold one micro-batch: what is to be called, and what came of it."""

    index: int
    """Its place among all batches."""
    call: Callable[[], Any]
    seed: int
    output: Any = None
    error: BaseException | None = None
    timing: Timing = field(default_factory=Timing)


class Course(Protocol):
    """Say who goes on; called by whoever has the baton."""

    is_ending: bool
    is_abandoned: bool

    def next_seat(self) -> Seat:
        """Choose who has the baton next; may be who asks."""

    def note_done(self, member: Member) -> None:
        """Take a member back whose micro-batch is done."""


class Member:
    """Take micro-batches through the model in a thread of its own. See the head of this file.

    Args:
        course: says who is next.
        seat: its own.
        party: the visit that its visits go with, asked at each.
        settle: waits for what was computed, to time a first block; None where there is nothing to wait for.
        greet: called in the thread before its first micro-batch; gives what is called in it after each, to leave what
            an end of the convoy left entered.
    """

    def __init__(
        self,
        course: Course,
        seat: Seat,
        party: Callable[[], Visit],
        settle: Callable[[], None] | None,
        greet: Callable[[Member], Callable[[], None]],
    ) -> None:
        self._course = course
        self.seat = seat
        self._party = party
        self._settle = settle
        self._greet = greet
        self.job: Job | None = None
        self.block: int | None = None
        """The block whose turn it waits for; None before the first one."""
        self.place = (0, 0, False)
        """How far it has come: visits, and blocks in this one."""
        self.is_lost = False
        """Whether the convoy went on without it, because it never came back."""
        self.is_waiting = True
        self._num_visits = 0
        self._is_first_block = False
        self._since_s = 0.0
        self._waited_s = 0.0
        self.thread = threading.Thread(target=self._live, name="lading-convoy", daemon=True)

    def board(self, job: Job) -> None:
        """Take a micro-batch along; it begins when the baton comes, with the default dtype of who takes it along."""
        self.job, self.block, self.place = job, None, (0, 0, False)
        self.seat.luggage.pack()
        self._num_visits = 0
        if self.thread.ident is None:
            limit_arenas()
            self.thread.start()

    def dismiss(self) -> None:
        """End the thread, which has no micro-batch. Twice is fine, and so is one that never started."""
        self.job = None
        if not self.seat.is_called:
            self.seat.call()
        with suppress(RuntimeError):  # an interruption kept it from starting
            self.thread.join()

    def _live(self) -> None:
        leave_all = self._greet(self)
        while True:
            self.seat.take()
            job = self.job
            if job is None:
                return
            self.is_waiting = False
            try:
                self._begin(job)
                job.output = job.call()
            except Ended:
                job.error = Ended()
            except BaseException as error:  # noqa: BLE001 - the caller's to raise
                job.error = error
            del job
            leave_all()
            if not self._end():
                return

    def _begin(self, job: Job) -> None:
        if self._course.is_ending:
            raise Ended
        self.seat.luggage.unpack()
        torch.manual_seed(job.seed)
        self._is_first_block = False
        self._waited_s = 0.0
        self._since_s = time.perf_counter()

    def _end(self) -> bool:
        """Hand in what came of the micro-batch; False if nobody waits for it any more."""
        if self.is_lost:
            return False
        self._count()
        self.is_waiting = True
        self._course.note_done(self)
        is_over = self._course.is_abandoned
        self._course.next_seat().call()
        return not is_over

    def _count(self) -> None:
        assert self.job is not None
        if self._settle is not None and self._is_first_block:
            self._settle()
        now = time.perf_counter()
        seconds = max(0.0, now - self._since_s - self._waited_s)
        timing = self.job.timing
        timing.run_s += seconds
        timing.wait_s += self._waited_s
        self._since_s, self._waited_s = now, 0.0
        if self._is_first_block and timing.first_block_s is None:
            timing.first_block_s = seconds

    # What hooks tell

    @property
    def party(self) -> Visit:
        """Give the convoy's visit.

        Raises:
            Ended: it went on without this micro-batch.
        """
        if self.is_lost:
            raise Ended
        return self._party()

    def set_out(self, visit: Visit) -> None:
        """Begin one more visit."""
        visit.turn = self._num_visits
        self._num_visits += 1

    def wait_turn(self, visit: Visit, block: int) -> None:
        """Pass the baton on until this block is open for this micro-batch.

        Raises:
            Ended: the convoy ends.
        """
        if self.is_lost:
            raise Ended
        self._count()
        self._is_first_block = self.block is None
        self.block, self.place = block, visit.place
        seat = self._course.next_seat()
        if seat is not self.seat:
            self.seat.luggage.pack()
            self.is_waiting = True
            seat.call()
            self.seat.take()
            self.is_waiting = False
            if not self._course.is_abandoned:  # else the process is not the convoy's any more
                self.seat.luggage.unpack()
        if self._settle is not None and self._is_first_block:
            self._settle()
        self._since_s = time.perf_counter()
        if self._course.is_ending:
            raise Ended

    def note_wait(self, seconds: float) -> None:
        """Count time in which weights were waited for apart."""
        self._waited_s += seconds


@cache
def limit_arenas() -> None:
    """Have malloc make no more arenas for threads to come: each keeps what its thread freed, and one runs at a time.

    Of glibc, for the process, for good: it has no way back. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
