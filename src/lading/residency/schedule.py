"""Decide which block is fetched and which is evicted next, for any number of threads inside one model.

Knows numbers of blocks and bytes; moves nothing itself (a `Mover` does), knows no tensor and no module.

A *visit* is one thread's outermost call into the model. It enters blocks one after the other and holds at most one: a
block entered inside another gives the outer one up and takes it back afterwards, so that nobody waits while holding
something, and nothing can deadlock. What a thread enters and is not resident becomes a *ticket*; tickets are served in
the order in which they were drawn, before anything is fetched ahead. Where a ticket finds all room taken by blocks with
somebody inside, one of them is *closed*: who wants to enter it draws a ticket, who is inside leaves in time.

A thread that was interrupted (KeyboardInterrupt) may never say that it left. Whoever waits asks once in a while whether
each visitor still stands in a forward, and ends the visits of those that do not.

What will be needed next is what the last visit through the same door needed next; before there was one, what the plan
says. The block whose next use is furthest is evicted first.

Concurrency: any thread may call everything. `_lock` guards all fields; movers are called without it, except `enter`,
`join`, `part`, `leave` and `begin`, which must not wait. One worker thread steps; where there is none (after a fork),
whoever waits does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

from lading.errors import ResidencyError, refusal
from lading.residency.room import Room

_LOG = logging.getLogger(__name__)
_CHECK_S = 1.0  # how often whoever waits looks for visitors that were interrupted
_LOOKAHEAD = 256  # blocks; what is needed after these counts as never needed again


class State(Enum):
    """Say where a block is between its home and the execution device."""

    ABSENT = "absent"
    FETCHING = "fetching"
    RESIDENT = "resident"
    EVICTING = "evicting"


class Mover(Protocol):
    """Move blocks between their homes and the execution device."""

    makes_copies: bool
    """Whether what is fetched is a copy, which an edit of its home between two forwards makes stale."""

    def begin(self) -> None:
        """Prepare for forwards after a time in which nobody was inside; must not wait."""

    def fetch(self, block: int) -> None:
        """Bring a block to where it can be entered. Blocks; raises what went wrong."""

    def enter(self, block: int) -> None:
        """Make a fetched block usable: the first visitor enters. Must not wait."""

    def join(self, block: int) -> None:
        """Prepare the calling thread, which entered. Must not wait."""

    def part(self, block: int) -> None:
        """Note that the calling thread leaves. Must not wait."""

    def leave(self, block: int) -> None:
        """Undo `enter`: the last visitor left. Must not wait."""

    def evict(self, block: int) -> int:
        """Free a block's memory; gives the bytes that had to stay because they were edited."""


@dataclass(slots=True)
class Counts:
    """Count what happened; guarded by the schedule's lock."""

    fetches: int = 0
    fetched_bytes: int = 0
    evictions: int = 0
    hits: int = 0
    waits: int = 0
    wait_s: float = 0.0
    peak_bytes: int = 0


class Visit:
    """Follow one thread's outermost call into the model. Used by that thread; read under the schedule's lock."""

    __slots__ = ("door", "expected", "held", "is_over", "leased", "lent_bytes", "position", "seen", "thread_id")

    def __init__(self, door: object, expected: tuple[int, ...]) -> None:
        self.door = door
        self.expected = expected
        self.position = 0
        """How many of ``expected`` are behind us."""
        self.seen: list[int] = []
        self.held: list[int] = []
        """Blocks entered and not left; only the last is leased."""
        self.leased: int | None = None
        """The block that is kept for this visit; None between blocks, and where fetching the last again failed."""
        self.lent_bytes = 0
        self.thread_id = threading.get_ident()
        self.is_over = False


@dataclass(slots=True, eq=False)
class _Ticket:
    """One thread's wish for a block, or for bytes alone (``block`` is None)."""

    visit: Visit
    block: int | None
    num_bytes: int
    is_granted: bool = False
    error: BaseException | None = None


@dataclass(slots=True)
class _Orders:
    """Remember in which order each door's visits entered blocks."""

    planned: tuple[int, ...]
    learned: dict[object, tuple[int, ...]] = field(default_factory=dict)

    def of(self, door: object, reachable: frozenset[int]) -> tuple[int, ...]:
        known = self.learned.get(door)
        return known if known is not None else tuple(block for block in self.planned if block in reachable)


class Schedule:
    """Admit threads to blocks within a room. See the head of this file.

    Args:
        sizes: bytes of each block.
        room: what may be on the execution device at once.
        mover: moves them.
        planned: the order in which blocks will be entered, as far as anybody knows.
    """

    def __init__(self, sizes: Sequence[int], room: Room, mover: Mover, planned: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._room = room
        self._mover = mover
        self._lock = threading.Lock()
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        self._is_woken = False
        self._is_settled = False
        """Whether every block is here: nobody need be woken to look for one to fetch."""
        self._change = threading.Condition(self._lock)
        self._states = [State.ABSENT] * len(self._sizes)
        self._leases = [0] * len(self._sizes)
        self._entered: set[int] = set()
        self._closed: set[int] = set()
        self._stale: set[int] = set()
        self._tickets: list[_Ticket] = []
        self._visits: list[Visit] = []
        self._orders = _Orders(planned=tuple(planned))
        self._editors: list[int] = []
        self._is_shut = False
        self._is_ended = False
        self._is_stepping = False
        self._worker: threading.Thread | None = None
        self._can_have_worker = True
        self.counts = Counts()
        self.is_inside: Callable[[int], bool] = lambda _: True
        """Whether a thread (its identity) may still be in a forward; must not wait."""
        _FORKS.watch(self)

    # Visits

    def begin(self, door: object, reachable: frozenset[int]) -> Visit:
        """Open a visit through a door: a module. Waits while somebody edits.

        Args:
            door: whose order is learned.
            reachable: the blocks below it.

        Raises:
            ResidencyError: closed; or this thread itself is editing.
            CorruptShardError: a file behind the weights was changed in place.
        """
        with self._lock:
            if threading.get_ident() in self._editors:
                raise ResidencyError(
                    refusal(
                        "a forward of an offloaded model",
                        found="residency.editing() around it, in this thread",
                        expected="none",
                        way_out="call the model before or after the edits",
                    )
                )
            while self._editors or (not self._visits and State.EVICTING in self._states):
                self._change.wait()
            if self._is_shut:
                raise ResidencyError(
                    refusal(
                        "a forward of an offloaded model",
                        found="its residency closed",
                        expected="an open one",
                        way_out="call lading.offload again",
                    )
                )
            if not self._visits:
                self._start()
            visit = Visit(door, self._orders.of(door, reachable))
            self._visits.append(visit)
            self._wake()
            return visit

    def end(self, visit: Visit, *, is_complete: bool) -> None:
        """Close a visit; evictions end before this returns, if nobody else is inside.

        Args:
            visit: gives up what it still holds.
            is_complete: whether it went through; else its order is not learned.
        """
        with self._lock:
            self._end(visit)
            if is_complete:
                self._orders.learned[visit.door] = tuple(visit.seen)
            while not self._visits and State.EVICTING in self._states:
                self._change.wait()

    def _end(self, visit: Visit) -> None:
        visit.is_over = True
        self._tickets = [ticket for ticket in self._tickets if ticket.visit is not visit]
        if visit in self._visits:
            self._visits.remove(visit)
        self._give_up(visit)
        visit.held.clear()
        if self._tickets:
            self._wake()
        self._change.notify_all()

    def repair(self, keep: Visit | None) -> None:
        """Put right what an interruption of this thread, between any two lines of this file, may have left.

        Args:
            keep: the visit that this thread is on; others of it are ended.
        """
        with self._lock:
            me = threading.get_ident()
            for visit in [visit for visit in self._visits if visit.thread_id == me and visit is not keep]:
                self._end(visit)
            self._tickets = [ticket for ticket in self._tickets if ticket.visit is not keep]
            leases = Counter(visit.leased for visit in self._visits if visit.leased is not None)
            for block, count in enumerate(self._leases):
                if count != leases[block] or (block in self._entered) != (leases[block] > 0):
                    self._leases[block] = leases[block]
                    self._pass_on(block)
            self._room.release(self._room.lent_bytes - sum(visit.lent_bytes for visit in self._visits))
            self._wake()
            self._change.notify_all()

    def _end_interrupted(self) -> None:
        """End the visits of threads that are in no forward any more."""
        for visit in list(self._visits):
            if not self.is_inside(visit.thread_id):
                self._end(visit)

    def _start(self) -> None:
        """Forget copies that an edit may have made stale, and let the mover look around."""
        self._is_settled = False
        if self._mover.makes_copies:
            for block, state in enumerate(self._states):
                if state is State.RESIDENT:
                    self._states[block] = State.ABSENT
                    self._room.leave(block, 0)
                elif state is State.FETCHING:
                    self._stale.add(block)
        self._mover.begin()

    # Blocks

    def enter(self, visit: Visit, block: int) -> None:
        """Enter a block: wait until it is resident, and keep it so until `leave`.

        Raises:
            ResidencyError: it cannot be fetched, or there is no room for it because of edits.
        """
        with self._lock:
            self._give_up(visit)
            try:
                self._admit(visit, block, is_new=True)
            except Exception:
                self._enter_again(visit)
                raise
            visit.held.append(block)

    def leave(self, visit: Visit, block: int) -> None:
        """Leave a block; what it was entered from is entered again."""
        with self._lock:
            if block not in visit.held:
                return
            while visit.held.pop() != block:
                pass
            self._release(visit)
            self._enter_again(visit)
            if not visit.held and (self._tickets or not self._is_settled):
                self._wake()

    def _enter_again(self, visit: Visit) -> None:
        """Take back the block that the visit is still in the forward of."""
        if visit.held and visit.leased is None and not visit.is_over:
            self._admit(visit, visit.held[-1])

    def _admit(self, visit: Visit, block: int, *, is_new: bool = False) -> None:
        if is_new:
            _advance(visit, block)
        if self._states[block] is State.RESIDENT and block not in self._closed:
            self.counts.hits += 1
            self._lease(visit, block)
            if not self._is_settled:
                self._wake()
        else:
            self._wait_for(_Ticket(visit, block, self._sizes[block]))
        self._mover.join(block)

    def _wait_for(self, ticket: _Ticket) -> None:
        self.counts.waits += 1
        began = time.perf_counter()
        self._tickets.append(ticket)
        self._wake()
        try:
            while not ticket.is_granted and ticket.error is None:
                if (self._has_worker() or self._is_stepping or not self._step()) and not self._change.wait(_CHECK_S):
                    self._end_interrupted()
                    self._wake()
        finally:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self.counts.wait_s += time.perf_counter() - began
        if ticket.error is not None:
            raise ticket.error

    @property
    def lendable_bytes(self) -> int:
        """Give the most that `borrow` can ever give."""
        with self._lock:
            return self._room.lendable_bytes

    def borrow(self, visit: Visit, num_bytes: int) -> None:
        """Keep room for bytes that come in by use, such as rows of a table, until `give_back`.

        The block that this visit is inside of is given up meanwhile: who holds room must not wait for more.

        Raises:
            ResidencyError: there will never be that much.
        """
        with self._lock:
            self._give_up(visit)
            try:
                self._wait_for(_Ticket(visit, None, num_bytes))
            except Exception:
                self._enter_again(visit)
                raise

    def give_back(self, visit: Visit, num_bytes: int) -> None:
        """End what `borrow` began, and enter again what was given up."""
        with self._lock:
            if visit.lent_bytes >= num_bytes:
                self._give_back(visit, num_bytes)
            self._enter_again(visit)

    def _give_up(self, visit: Visit) -> None:
        self._release(visit)
        if visit.lent_bytes:
            self._give_back(visit, visit.lent_bytes)

    def _give_back(self, visit: Visit, num_bytes: int) -> None:
        visit.lent_bytes -= num_bytes
        self._room.release(num_bytes)
        self._wake()

    def _lease(self, visit: Visit, block: int) -> None:
        visit.leased = block
        self._leases[block] += 1
        self._pass_on(block)

    def _release(self, visit: Visit) -> None:
        block, visit.leased = visit.leased, None
        if block is not None:
            self._mover.part(block)
            self._leases[block] -= 1
            self._pass_on(block)

    def _pass_on(self, block: int) -> None:
        """Tell the mover that the first visitor entered a block, or the last one left it."""
        if self._leases[block] and block not in self._entered:
            self._entered.add(block)
            self._mover.enter(block)
        elif not self._leases[block] and block in self._entered:
            self._mover.leave(block)
            self._entered.discard(block)
            if self._tickets:
                self._wake()

    # Steps

    def _wake(self) -> None:
        if not self._has_worker() and self._can_have_worker and not self._is_ended:
            self._worker = threading.Thread(target=_work, args=(self,), name="lading-residency", daemon=True)
            try:
                self._worker.start()
            except RuntimeError as error:  # the interpreter ends, or there are too many: whoever waits steps
                self._worker, self._can_have_worker = None, False
                _LOG.warning("blocks are not fetched ahead: %s", error)
        if not self._can_have_worker:
            self._change.notify_all()
        elif not self._is_woken:
            self._wakes.put(True)  # before it is noted, lest an interruption between lines loses it
            self._is_woken = True

    def _has_worker(self) -> bool:
        return self._worker is not None and self._worker.is_alive()

    def _step(self) -> bool:
        """Do one thing that is due, with the lock given up meanwhile; say whether there was one."""
        self._grant()
        due = self._due()
        self._is_settled = due is None and self._states.count(State.RESIDENT) == len(self._states)
        if due is None:
            return False
        block, is_fetch = due
        self._states[block] = State.FETCHING if is_fetch else State.EVICTING
        if is_fetch:
            self._room.enter(block)
            self._count_peak()
        else:
            self._closed.discard(block)
        kept = 0
        failure: BaseException | None = None
        self._is_stepping = True
        self._lock.release()
        try:
            if is_fetch:
                self._mover.fetch(block)
            else:
                kept = self._mover.evict(block)
        except BaseException as error:  # every waiter raises it
            failure = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._lock.acquire()
            self._is_stepping = False
            self._finish(block, kept, failure, is_fetch=is_fetch)
        return True

    def _finish(self, block: int, kept: int, failure: BaseException | None, *, is_fetch: bool) -> None:
        if not is_fetch:
            self._states[block] = State.ABSENT
            if failure is None:
                self.counts.evictions += 1
            else:
                kept = self._sizes[block]
                _LOG.warning("weights stay in memory: %s", failure)
            self._room.leave(block, kept)
        elif failure is None and block not in self._stale:
            self._states[block] = State.RESIDENT
            self.counts.fetches += 1
            self.counts.fetched_bytes += self._sizes[block]
        else:
            self._states[block] = State.ABSENT
            self._room.cancel(block)
        self._stale.discard(block)
        if is_fetch and isinstance(failure, Exception):
            for ticket in self._tickets:
                if ticket.block == block and not ticket.is_granted:
                    ticket.error = failure
            self._forget(block)
        self._grant()
        self._change.notify_all()

    def _forget(self, block: int) -> None:
        """Fetch a block ahead no more after it failed; whoever enters it tries again and is told."""
        for visit in self._visits:
            visit.expected = tuple(each for each in visit.expected[visit.position :] if each != block)
            visit.position = 0

    def _grant(self) -> None:
        """Let in everybody whose block is there."""
        for ticket in list(self._tickets):
            block = ticket.block
            if ticket.is_granted or ticket.error is not None or block is None:
                continue
            if self._states[block] is State.RESIDENT and block not in self._closed:
                self._lease(ticket.visit, block)
                self._let_in(ticket)

    def _let_in(self, ticket: _Ticket) -> None:
        ticket.is_granted = True
        self._tickets.remove(ticket)
        self._change.notify_all()

    def _count_peak(self) -> None:
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._room.used_bytes)

    def _due(self) -> tuple[int, bool] | None:
        """Choose a block and whether to fetch it, else to evict it; None while there is nothing to do."""
        ranks: dict[int, int] = {}
        for needed in islice(self._upcoming(), _LOOKAHEAD):
            ranks.setdefault(needed, len(ranks))
        for ticket in list(self._tickets):
            if ticket.error is not None or ticket.is_granted:
                continue
            block = ticket.block
            if block is not None and self._states[block] is not State.ABSENT:
                if self._states[block] is State.RESIDENT:  # closed for somebody who has been served by now
                    self._closed.discard(block)
                    self._grant()
                continue
            way = self._room.make_way(block, ticket.num_bytes, self._idle(ranks, -1))
            if way:
                return way[0], False
            if way is None:
                if self._make_room_for(ticket, ranks):
                    continue
                return None
            if block is not None:
                return block, True
            self._room.take(ticket.num_bytes)
            ticket.visit.lent_bytes += ticket.num_bytes
            self._count_peak()
            self._let_in(ticket)
        self._closed.clear()
        return self._ahead(ranks)

    def _make_room_for(self, ticket: _Ticket, ranks: dict[int, int]) -> bool:
        """Close a block that is in the way; where nothing can ever make way, refuse the ticket: True."""
        if State.FETCHING in self._states or State.EVICTING in self._states:
            return False
        leased = [block for block, count in enumerate(self._leases) if count]
        in_the_way = self._room.obstacles(ticket.block, leased)
        if in_the_way:
            open_ones = [block for block in in_the_way if block not in self._closed]
            if len(open_ones) == len(in_the_way):
                self._closed.add(max(open_ones, key=lambda block: ranks.get(block, len(ranks))))
            return False
        if self._room.lent_bytes:
            return False
        ticket.error = ResidencyError(self._room.refusal(ticket.num_bytes))
        self._change.notify_all()
        return True

    def _ahead(self, ranks: dict[int, int]) -> tuple[int, bool] | None:
        """Choose what to fetch ahead: the next absent block, if nothing that is needed before it has to go.

        Where anything at all has to go, only what is entered next: fetched earlier, it would take the place of what
        this forward began with, and the next one would find nothing left.
        """
        for block, rank in ranks.items():
            if self._states[block] is not State.ABSENT:
                continue
            way = self._room.make_way(block, self._sizes[block], self._idle(ranks, rank))
            if way is None or (way and rank >= len(self._visits)):
                return None
            return (way[0], False) if way else (block, True)
        return None

    def _idle(self, ranks: dict[int, int], rank: int) -> list[int]:
        """List resident blocks with nobody inside, needed after ``rank`` or not at all, furthest use first."""
        never = len(self._sizes) + len(ranks)
        idle = [
            block
            for block, state in enumerate(self._states)
            if state is State.RESIDENT and not self._leases[block] and ranks.get(block, never) > rank
        ]
        return sorted(idle, key=lambda block: ranks.get(block, never), reverse=True)

    def _upcoming(self) -> Iterator[int]:
        """Yield the blocks that visits will enter, the nearest of each visit first.

        After the last comes the first again, for the next forward: else what it begins with would make way, and a cycle
        through more blocks than there is room for would find none of them.
        """
        ahead = [visit.expected[visit.position :] + visit.expected[: visit.position] for visit in self._visits]
        for depth in range(max(map(len, ahead), default=0)):
            for blocks in ahead:
                if depth < len(blocks):
                    yield blocks[depth]

    # Between forwards

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out until the block of code ends."""
        with self._lock:
            self._editors.append(threading.get_ident())
            try:
                self._drain()
            except BaseException:
                self._editors.remove(threading.get_ident())
                self._change.notify_all()
                raise
        try:
            yield
        finally:
            with self._lock:
                self._editors.remove(threading.get_ident())
                self._change.notify_all()

    def _drain(self) -> None:
        while self._visits or State.EVICTING in self._states or State.FETCHING in self._states:
            self._end_interrupted()
            if self._visits or self._is_stepping:
                self._change.wait(_CHECK_S)

    def close(self) -> None:
        """Wait for whoever is inside, refuse newcomers, end the worker. Twice is fine."""
        with self._lock:
            self._is_shut = True
            try:
                self._drain()
            except BaseException:  # such as KeyboardInterrupt: open as before
                self._is_shut = False
                raise
            self._is_ended = True
            worker, self._worker = self._worker, None
            self._wakes.put(False)
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def abandon(self) -> None:
        """End the worker without waiting for anybody: when nobody can be inside any more. Safe in a finalizer."""
        self._is_shut = self._is_ended = True
        self._wakes.put(False)

    def _restart_in_child(self) -> None:
        """Go on after a fork: other threads are gone, and with them the worker and their visits."""
        self._lock = threading.Lock()
        self._wakes = SimpleQueue()
        self._is_woken = False
        self._change = threading.Condition(self._lock)
        self._worker, self._can_have_worker = None, False
        self._is_stepping = False
        me = threading.get_ident()
        self._visits = [visit for visit in self._visits if visit.thread_id == me]
        self._tickets.clear()
        self._closed.clear()
        self._stale.clear()
        inside = {visit.leased for visit in self._visits}
        for block, state in enumerate(self._states):
            self._leases[block] = sum(visit.leased == block for visit in self._visits)
            if block not in inside:
                if block in self._entered:
                    self._pass_on(block)
                if state is not State.ABSENT:
                    self._states[block] = State.ABSENT
                    self._room.leave(block, 0)
        self._room.release(self._room.lent_bytes - sum(visit.lent_bytes for visit in self._visits))
        self._editors = [editor for editor in self._editors if editor == me]


def _advance(visit: Visit, block: int) -> None:
    """Note that a visit enters a block, and find where in the expected order it is now."""
    visit.seen.append(block)
    try:
        visit.position = visit.expected.index(block, visit.position) + 1
    except ValueError:
        if block in visit.expected:
            visit.position = visit.expected.index(block) + 1


def _work(schedule: Schedule) -> None:
    """Step until the schedule is shut: the worker thread."""
    while schedule._wakes.get():
        with schedule._lock:
            schedule._is_woken = False
            while not schedule._is_ended and schedule._step():
                pass


class _Forks:
    """Keep every schedule consistent while this process forks: no lock is held by a thread that the child lacks."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[Schedule] = weakref.WeakSet()
        self._stopped: list[Schedule] = []
        self._is_watching = False
        self._lock = threading.Lock()  # two threads may fork at once

    def watch(self, schedule: Schedule) -> None:
        self._live.add(schedule)
        if not self._is_watching:
            self._is_watching = True
            os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _before(self) -> None:
        self._lock.acquire()
        self._stopped = list(self._live)
        for schedule in self._stopped:
            schedule._lock.acquire()

    def _in_parent(self) -> None:
        while self._stopped:
            self._stopped.pop()._lock.release()
        self._lock.release()

    def _in_child(self) -> None:
        while self._stopped:
            self._stopped.pop()._restart_in_child()
        self._lock = threading.Lock()


_FORKS = _Forks()
