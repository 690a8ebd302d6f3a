"""Admit threads to the blocks of one model, and have blocks fetched and evicted so that each gets its turn.

Knows numbers of blocks and bytes; moves nothing itself (a `Mover` does), knows no tensor and no module. What comes next
is for `choice` to say; the account of blocks and threads is the `ledger`'s.

A *visit* is one thread's outermost call into the model. It enters blocks one after the other and holds at most one: a
block entered inside another gives the outer one up and takes it back afterwards, so that nobody waits while holding
something, and nothing can deadlock. What is not resident becomes a *ticket*; tickets are served in the order in which
they were drawn, before anything is fetched ahead. Where a ticket finds all room taken by blocks with somebody inside,
one of them is *closed*: who wants to enter it draws a ticket, who is inside leaves in time.

Whoever waits asks once in a while whether each visitor still stands in a forward, and ends the visits of those that do
not: a thread that was interrupted (KeyboardInterrupt) may never say that it left.

Guarantees that a block is resident while somebody is inside, that the room is never exceeded, and that everybody who
waits gets in or is told why not, as long as whoever is inside leaves in time.

Concurrency: any thread may call everything. `_lock` guards all fields; movers are called without it, except what must
not wait. One worker thread steps; where there is none (after a fork), whoever waits does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lading.residency.choice import next_move
from lading.residency.forks import FORKS
from lading.residency.ledger import Ledger
from lading.residency.moving import Counts, Move, Mover, State
from lading.residency.refusals import forward_after_close, forward_while_editing
from lading.residency.room import Room
from lading.residency.visits import Orders, Ticket, Visit
from lading.residency.worker import Worker

_LOG = logging.getLogger(__name__)
_CHECK_S = 1.0  # how often whoever waits looks for visitors that were interrupted


class Schedule:
    """Admit threads to blocks within a room. See the head of this file.

    Args:
        sizes: bytes of each block.
        room: what may be on the execution device at once.
        mover: moves them.
        planned: the order in which blocks will be entered, as far as anybody knows.
    """

    def __init__(self, sizes: Sequence[int], room: Room, mover: Mover, planned: Sequence[int]) -> None:
        self._mover = mover
        self._lock = threading.Lock()
        self._is_settled = False  # whether every block is here: nobody need be woken to look for one to fetch
        self._change = threading.Condition(self._lock)
        self._ledger = Ledger(sizes, room, mover, self._change)
        self._orders = Orders(planned=tuple(planned))
        self._editors: list[int] = []
        self._is_shut = False
        self._is_stepping = False
        self._worker = Worker()
        self.is_inside: Callable[[int], bool] = lambda _: True  # whether a thread (its identity) may be in a forward
        FORKS.watch(self)

    # Visits

    def begin(self, door: object, reachable: frozenset[int], party: Visit | None = None) -> Visit:
        """Open a visit through a door: a module. Waits while somebody edits.

        Args:
            door: whose order is learned.
            reachable: the blocks below it.
            party: the convoy's visit that this one goes with: it is inside already, and waits for nobody.

        Raises:
            ResidencyError: closed; or this thread itself is editing.
            CorruptShardError: a file behind the weights was changed in place.
        """
        with self._lock:
            if party is None:
                self._wait_to_begin()
            visit = Visit(door, self._orders.of(door, reachable), party=party)
            if party is not None or not self._mover.makes_copies:  # else copies are stale by the next visit
                visit.is_repeated = door in self._orders.learned
            self._ledger.visits.append(visit)
            self._wake()
            return visit

    def begin_party(self, party: Visit) -> None:
        """Open a convoy's visit, which `end` alone ends; it is noted before by who does. Raises as `begin`."""
        with self._lock:
            if party.party is None:
                self._wait_to_begin()
            self._ledger.visits.append(party)
            self._wake()

    def _wait_to_begin(self) -> None:
        if self.leads_party:  # it is inside already: who edits waits for it
            return
        if threading.get_ident() in self._editors:
            raise forward_while_editing()
        while self._editors or (not self._ledger.visits and State.EVICTING in self._ledger.states):
            self._change.wait()
        if self._is_shut:
            raise forward_after_close()
        if not self._ledger.visits:
            self._start()

    def end(self, visit: Visit, *, is_complete: bool) -> None:
        """Close a visit, learn its order if it went through; evictions end before this returns, if nobody is inside."""
        with self._lock:
            self._end(visit)
            if is_complete:
                self._orders.learned[visit.door] = tuple(visit.seen)
            while not self._ledger.visits and State.EVICTING in self._ledger.states:
                self._change.wait()

    def _end(self, visit: Visit) -> None:
        visit.is_over = True
        self._ledger.withdraw(visit)
        if visit in self._ledger.visits:
            self._ledger.visits.remove(visit)
        self._give_up(visit)
        visit.held.clear()
        if self._ledger.tickets:
            self._wake()
        self._change.notify_all()

    def end_thread(self, thread_id: int | None) -> None:
        """Close the visits of a thread that will not do so itself."""
        with self._lock:
            for visit in list(self._ledger.visits):
                if visit.thread_id == thread_id:
                    self._end(visit)

    def repair(self, keep: Visit | None) -> None:
        """Put right what an interruption of this thread, between any two lines of this file, may have left.

        Args:
            keep: the visit that this thread is on; others of it are ended.
        """
        with self._lock:
            me = threading.get_ident()
            for visit in list(self._ledger.visits):
                if visit.thread_id == me and visit is not keep and not visit.is_party:
                    self._end(visit)
            self._ledger.withdraw(keep)
            self._ledger.recount()
            self._wake()
            self._change.notify_all()

    def _end_interrupted(self) -> None:
        """End the visits of threads that are in no forward any more."""
        for visit in list(self._ledger.visits):
            if not visit.is_party and not self.is_inside(visit.thread_id):
                self._end(visit)

    def _start(self) -> None:
        """Forget copies that an edit may have made stale, and let the mover look around."""
        self._is_settled = False
        if self._mover.makes_copies:
            self._ledger.forget_copies()
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

    def pause(self, visit: Visit, block: int) -> None:
        """Give up what a visit holds, before it waits for its turn to enter a block."""
        with self._lock:
            visit.awaited = block
            self._give_up(visit)
            self._wake()

    def leave(self, visit: Visit, block: int) -> None:
        """Leave a block; what it was entered from is entered again."""
        with self._lock:
            if block not in visit.held:
                return
            while visit.held.pop() != block:
                pass
            self._release(visit)
            self._enter_again(visit)
            if not visit.held and (self._ledger.tickets or not self._is_settled):
                self._wake()

    def _enter_again(self, visit: Visit) -> None:
        """Take back the block that the visit is still in the forward of."""
        if visit.held and visit.leased is None and not visit.is_over:
            self._admit(visit, visit.held[-1])

    def _admit(self, visit: Visit, block: int, *, is_new: bool = False) -> None:
        if is_new:
            visit.advance(block)
        if self._ledger.is_open(block):
            self.counts.hits += 1
            self._ledger.lease(visit, block)
            if not self._is_settled:
                self._wake()
        else:
            self._wait_for(Ticket(visit, block, self._ledger.sizes[block]))
        self._mover.join(block)

    def _wait_for(self, ticket: Ticket) -> None:
        self.counts.waits += 1
        began = time.perf_counter()
        self._ledger.tickets.append(ticket)
        self._wake()
        try:
            while not ticket.is_granted and ticket.error is None:
                do_others_step = self._worker.is_running or self._is_stepping
                if (do_others_step or not self._step()) and not self._change.wait(_CHECK_S):
                    self._end_interrupted()
                    self._wake()
        finally:
            if ticket in self._ledger.tickets:
                self._ledger.tickets.remove(ticket)
            self.counts.wait_s += time.perf_counter() - began
        if ticket.error is not None:
            raise ticket.error

    @property
    def counts(self) -> Counts:
        """Give what is counted, live."""
        return self._ledger.counts

    @property
    def leads_party(self) -> bool:
        """Say whether the calling thread has a convoy inside."""
        return self._ledger.leads_party(threading.get_ident())

    @property
    def lendable_bytes(self) -> int:
        """Give the most that `borrow` can ever give."""
        with self._lock:
            return self._ledger.room.lendable_bytes

    def borrow(self, visit: Visit, num_bytes: int) -> None:
        """Keep room for bytes that come in by use, such as rows of a table, until `give_back`.

        The block that this visit is inside of is given up meanwhile: who holds room must not wait for more.

        Raises:
            ResidencyError: there will never be that much.
        """
        with self._lock:
            self._give_up(visit)
            try:
                self._wait_for(Ticket(visit, None, num_bytes))
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
        self._ledger.take_back(visit, num_bytes)
        self._wake()

    def _release(self, visit: Visit) -> None:
        if self._ledger.release(visit):
            self._wake()

    # Steps

    def _wake(self) -> None:
        if not self._worker.wake(self._work):
            self._change.notify_all()

    def _work(self) -> None:
        """Step until the schedule is closed: the worker thread."""
        while self._worker.sleep():
            with self._lock:
                self._worker.rise()
                while not self._worker.is_ended and self._step():
                    pass

    def _step(self) -> bool:
        """Do one thing that is due, with the lock given up meanwhile; say whether there was one."""
        self._ledger.grant()
        move = next_move(self._ledger)
        self._is_settled = move is None and all(state is State.RESIDENT for state in self._ledger.states)
        if move is None:
            return False
        self._ledger.begin(move)
        kept = 0
        failure: BaseException | None = None
        self._is_stepping = True
        self._lock.release()
        try:
            if move.is_fetch:
                self._mover.fetch(move.block)
            else:
                kept = self._mover.evict(move.block)
        except BaseException as error:  # every waiter raises it
            failure = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._lock.acquire()
            self._is_stepping = False
            self._finish(move, kept, failure)
        return True

    def _finish(self, move: Move, kept: int, failure: BaseException | None) -> None:
        self._ledger.finish(move, kept, failure)
        if failure is not None and not move.is_fetch:
            _LOG.warning("weights stay in memory: %s", failure)
        self._ledger.grant()
        self._change.notify_all()

    # Between forwards

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out until the block of code ends."""
        with self._lock:
            self._editors.append(threading.get_ident())
        try:
            with self._lock:
                self._drain()
            yield
        finally:
            with self._lock:
                self._editors.remove(threading.get_ident())
                self._change.notify_all()

    def _drain(self) -> None:
        while self._ledger.visits or self._ledger.is_moving:
            self._end_interrupted()
            if self._ledger.visits or self._is_stepping:
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
            self._worker.end()
            thread, self._worker.thread = self._worker.thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def abandon(self) -> None:
        """End the worker without waiting: when nobody can be inside any more. Safe in a finalizer."""
        self._is_shut = True
        self._worker.end()

    # Forks

    def stop_for_fork(self) -> None:
        """Stand still, so that a child gets nothing half done."""
        self._lock.acquire()

    def go_on_in_parent(self) -> None:
        """End what `stop_for_fork` began."""
        self._lock.release()

    def restart_in_child(self) -> None:
        """Go on after a fork: other threads are gone, and with them the worker and their visits."""
        self._lock = threading.Lock()
        self._change = threading.Condition(self._lock)
        self._worker = Worker(can_run=False, is_ended=self._worker.is_ended)
        self._is_stepping = False
        me = threading.get_ident()
        self._ledger.keep_thread(me, self._change)
        self._editors = [editor for editor in self._editors if editor == me]
