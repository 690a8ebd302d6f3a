"""Decide which block is fetched and which is evicted next, for any number of threads inside one model.

Knows numbers of blocks and bytes; moves nothing itself (a `Mover` does), knows no tensor and no module.

A *visit* is one thread's outermost call into the model. It enters blocks one after the other and holds at most one: a
block entered inside another gives the outer one up and takes it back afterwards, so that nobody waits while holding
something, and nothing can deadlock. What a thread enters and is not resident becomes a *ticket*; tickets are served in
the order in which they were drawn, before anything is fetched ahead. Where a ticket finds all room taken by blocks with
somebody inside, one of them is *closed*: who wants to enter it draws a ticket, who is inside leaves in time.

What will be needed next is what the last visit through the same door needed next; before there was one, what the plan
says. A lone visit that repeats an earlier one is expected to be repeated itself: while it computes what needs no
fetching, the first blocks of the next one come in, beside room for what visits borrow. The block whose next use is
furthest is evicted first.

Concurrency: any thread may call everything. `_lock` guards all fields; movers are called without it, except `enter`,
`leave` and `begin`, which must not wait. One worker thread steps; where there is none (after a fork), whoever waits
does.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

from lading.errors import ResidencyError, refusal
from lading.residency.room import Room

_LOOKAHEAD = 64  # blocks; what is needed after these counts as never needed again


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

    __slots__ = ("borrowed_bytes", "door", "expected", "held", "is_repeated", "position", "seen")

    def __init__(self, door: object, expected: tuple[int, ...], *, is_repeated: bool = False) -> None:
        self.door = door
        self.expected = expected
        self.borrowed_bytes = 0
        self.is_repeated = is_repeated
        """Whether another one through the same door is likely to follow."""
        self.position = 0
        """How many of ``expected`` are behind us."""
        self.seen: list[int] = []
        self.held: list[int] = []
        """Blocks entered and not left; only the last is leased."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """One thread's wish for a block, or for bytes alone (``block`` is None)."""

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
        self._is_settled = False  # all blocks are here: nobody need be woken to look for one to fetch
        self._change = threading.Condition(self._lock)
        self._states = [State.ABSENT] * len(self._sizes)
        self._leases = [0] * len(self._sizes)
        self._closed: set[int] = set()
        self._stale: set[int] = set()
        self._tickets: list[_Ticket] = []
        self._visits: list[Visit] = []
        self._orders = _Orders(planned=tuple(planned))
        self._borrowed_bytes = 0
        self._editors = 0
        self._is_shut = False
        self._worker: threading.Thread | None = None
        self._can_have_worker = True
        self.counts = Counts()
        _FORKS.watch(self)

    # Visits

    def begin(self, door: object, reachable: frozenset[int]) -> Visit:
        """Open a visit through a door: a module. Waits while somebody edits.

        Args:
            door: whose order is learned.
            reachable: the blocks below it.

        Raises:
            ResidencyError: closed.
        """
        with self._lock:
            while self._editors:
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
            is_repeated = door in self._orders.learned and not self._mover.makes_copies  # copies would be stale by then
            visit = Visit(door, self._orders.of(door, reachable), is_repeated=is_repeated)
            if not self._visits:
                self._start()
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
            if visit.held:
                self._release(visit.held[-1])
                visit.held.clear()
            if is_complete:
                self._orders.learned[visit.door] = tuple(visit.seen)
                self._borrowed_bytes = visit.borrowed_bytes
            if visit in self._visits:
                self._visits.remove(visit)
            while not self._visits and State.EVICTING in self._states:
                self._change.wait()
            self._change.notify_all()

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
            if visit.held:
                self._release(visit.held[-1])
            try:
                self._admit(block, visit)
            except BaseException:
                if visit.held:
                    self._admit(visit.held[-1], None)
                raise
            visit.held.append(block)

    def leave(self, visit: Visit, block: int) -> None:
        """Leave a block; what it was entered from is entered again."""
        with self._lock:
            if block not in visit.held:
                return
            while visit.held:
                left = visit.held.pop()
                if left == block:
                    break
            self._release(left)
            if visit.held:
                self._admit(visit.held[-1], None)
            elif self._tickets or (not self._is_settled and self._has_more(visit)):
                self._wake()

    def _has_more(self, visit: Visit) -> bool:
        return visit.is_repeated or visit.position < len(visit.expected)

    def _admit(self, block: int, visit: Visit | None) -> None:
        if visit is not None:
            _advance(visit, block)
        if self._states[block] is State.RESIDENT and block not in self._closed:
            self.counts.hits += 1
            self._lease(block)
            if not self._is_settled:
                self._wake()
            return
        self._wait_for(_Ticket(block, self._sizes[block]))

    def _wait_for(self, ticket: _Ticket) -> None:
        self.counts.waits += 1
        began = time.perf_counter()
        self._tickets.append(ticket)
        self._wake()
        try:
            while not ticket.is_granted and ticket.error is None:
                if self._has_worker() or not self._step():
                    self._change.wait()
        except BaseException:  # such as KeyboardInterrupt
            if ticket.is_granted:
                self._take_back(ticket)
            raise
        finally:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self.counts.wait_s += time.perf_counter() - began
        if ticket.error is not None:
            raise ticket.error

    def _take_back(self, ticket: _Ticket) -> None:
        if ticket.block is None:
            self._give_back(ticket.num_bytes)
        else:
            self._release(ticket.block)

    def borrow(self, visit: Visit, num_bytes: int) -> None:
        """Keep room for bytes that come in by use, such as rows of a table, until `give_back`.

        Raises:
            ResidencyError: there will never be that much.
        """
        with self._lock:
            visit.borrowed_bytes = max(visit.borrowed_bytes, num_bytes)
            if visit.held:
                self._release(visit.held[-1])
            try:
                self._wait_for(_Ticket(None, num_bytes))
            finally:
                if visit.held:
                    self._admit(visit.held[-1], None)

    def give_back(self, num_bytes: int) -> None:
        """End what `borrow` began."""
        with self._lock:
            self._give_back(num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self._room.release(num_bytes)
        self._wake()

    def _lease(self, block: int) -> None:
        if not self._leases[block]:
            self._mover.enter(block)
        self._leases[block] += 1

    def _release(self, block: int) -> None:
        self._leases[block] -= 1
        if not self._leases[block]:
            self._mover.leave(block)
            if self._tickets:
                self._wake()

    # Steps

    def _wake(self) -> None:
        if not self._has_worker() and self._can_have_worker and not self._is_shut:
            self._worker = threading.Thread(target=_work, args=(self,), name="lading-residency", daemon=True)
            self._worker.start()
        if not self._can_have_worker:
            self._change.notify_all()
        elif not self._is_woken:
            self._is_woken = True
            self._wakes.put(True)

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
        kept, failure = 0, None
        self._lock.release()
        try:
            if is_fetch:
                self._mover.fetch(block)
            else:
                kept = self._mover.evict(block)
        except Exception as error:  # noqa: BLE001 - every waiter raises it
            failure = error
        finally:
            self._lock.acquire()
            self._finish(block, kept, failure, is_fetch=is_fetch)
        return True

    def _finish(self, block: int, kept: int, failure: Exception | None, *, is_fetch: bool) -> None:
        if is_fetch and failure is None and block not in self._stale:
            self._states[block] = State.RESIDENT
            self.counts.fetches += 1
            self.counts.fetched_bytes += self._sizes[block]
        else:
            self._states[block] = State.ABSENT
            self._room.leave(block, kept)
            self.counts.evictions += not is_fetch
        self._stale.discard(block)
        if failure is not None:
            for ticket in self._tickets:
                if ticket.block == block and not ticket.is_granted:
                    ticket.error = failure
            if not any(ticket.block == block for ticket in self._tickets):
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
                self._lease(block)
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
        """Choose what to fetch ahead: the next absent block, if nothing that is needed before it has to go."""
        this_time = {block for visit in self._visits for block in visit.expected[visit.position :]}
        for block, rank in ranks.items():
            if self._states[block] is not State.ABSENT:
                continue
            num_bytes = self._sizes[block] + (0 if block in this_time else self._borrowed_bytes)
            way = self._room.make_way(block, num_bytes, self._idle(ranks, rank))
            if way is None:
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
        """Yield the blocks that visits will enter, the nearest of each visit first."""
        ahead = [visit.expected[visit.position :] for visit in self._visits]
        for depth in range(max(map(len, ahead), default=0)):
            for blocks in ahead:
                if depth < len(blocks):
                    yield blocks[depth]
        if len(self._visits) == 1 and self._visits[0].is_repeated:
            yield from self._visits[0].expected

    # Between forwards

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out until the block of code ends."""
        with self._lock:
            self._editors += 1
            try:
                self._drain()
            except BaseException:
                self._editors -= 1
                self._change.notify_all()
                raise
        try:
            yield
        finally:
            with self._lock:
                self._editors -= 1
                self._change.notify_all()

    def _drain(self) -> None:
        while self._visits or State.EVICTING in self._states or State.FETCHING in self._states:
            self._change.wait()

    def close(self) -> None:
        """Wait for whoever is inside, refuse newcomers, end the worker. Twice is fine."""
        with self._lock:
            self._is_shut = True
            self._drain()
            worker, self._worker = self._worker, None
            self._wakes.put(False)
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def abandon(self) -> None:
        """End the worker without waiting for anybody: when nobody can be inside any more. Safe in a finalizer."""
        self._is_shut = True
        self._wakes.put(False)

    def _restart_in_child(self) -> None:
        """Go on after a fork: other threads are gone, and with them the worker and their visits."""
        self._lock = threading.Lock()
        self._wakes = SimpleQueue()
        self._is_woken = False
        self._change = threading.Condition(self._lock)
        self._worker, self._can_have_worker = None, False
        for visit in self._visits:
            visit.held.clear()
        self._visits.clear()
        self._tickets.clear()
        self._closed.clear()
        for block, state in enumerate(self._states):
            self._leases[block] = 0
            if state is not State.ABSENT:
                self._states[block] = State.ABSENT
                self._room.leave(block, 0)
        self._room.release(self._room.lent_bytes)
        self._editors = 0


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
            while not schedule._is_shut and schedule._step():
                pass


class _Forks:
    """Keep every schedule consistent while this process forks: no lock is held by a thread that the child lacks."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[Schedule] = weakref.WeakSet()
        self._stopped: list[Schedule] = []
        self._is_watching = False

    def watch(self, schedule: Schedule) -> None:
        self._live.add(schedule)
        if not self._is_watching:
            self._is_watching = True
            os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _before(self) -> None:
        self._stopped = list(self._live)
        for schedule in self._stopped:
            schedule._lock.acquire()

    def _in_parent(self) -> None:
        while self._stopped:
            self._stopped.pop()._lock.release()

    def _in_child(self) -> None:
        while self._stopped:
            self._stopped.pop()._restart_in_child()


_FORKS = _Forks()
