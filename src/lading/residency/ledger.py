"""Keep account of where each block is, who is inside, who waits, and what they have been lent.

Bookkeeping for a schedule: moves no bytes, waits for nothing, and does not choose what comes next. Of the mover it
calls only what must not wait; whom it serves it tells through the condition that it was given.

Guarantees that the mover has entered a block exactly while somebody has a lease on it, that the room counts what is on
its way, here, or lent, and that a ticket is served once. An interruption between two lines may break this; what visits
say counts as the truth, from which `recount` puts the rest right.

Concurrency: guarded by the schedule's lock, as are its fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Condition

from lading.residency.moving import Counts, Move, Mover, State
from lading.residency.room import Room
from lading.residency.visits import Ticket, Visit


class Ledger:
    """Hold what is known of blocks, tickets and visits. Guarded by the schedule's lock.

    Args:
        sizes: bytes of each block.
        room: what may be on the execution device at once.
        mover: is told who enters and who leaves.
        change: notified where a ticket was served or refused; on the schedule's lock.
    """

    def __init__(self, sizes: Sequence[int], room: Room, mover: Mover, change: Condition) -> None:
        self.sizes = tuple(sizes)
        self.room = room
        self.states = [State.ABSENT] * len(self.sizes)
        self.leases = [0] * len(self.sizes)
        """How many visits each block is kept for."""
        self.closed: set[int] = set()
        """Resident blocks that nobody else may enter, because they have to make way."""
        self.tickets: list[Ticket] = []
        self.visits: list[Visit] = []
        self.counts = Counts()
        self.most_lent_bytes = 0
        """The largest loan so far."""
        self._mover = mover
        self._change = change
        self._entered: set[int] = set()
        self._stale: set[int] = set()
        """Blocks under way whose copies an edit may have outdated."""

    def is_open(self, block: int) -> bool:
        """Say whether a block can be entered now."""
        return self.states[block] is State.RESIDENT and block not in self.closed

    @property
    def is_moving(self) -> bool:
        """Say whether a block is under way, in either direction."""
        return State.FETCHING in self.states or State.EVICTING in self.states

    def leads_party(self, thread_id: int) -> bool:
        """Say whether a thread has a convoy inside. Needs no lock: only that thread itself changes the answer."""
        return any(visit.is_party and visit.thread_id == thread_id for visit in tuple(self.visits))

    # Leases and loans

    def lease(self, visit: Visit, block: int) -> None:
        """Keep a resident block for a visit."""
        visit.leased = block
        self.leases[block] += 1
        self._pass_on(block)

    def release(self, visit: Visit) -> bool:
        """Give up a visit's lease, from its own thread; say whether somebody may wait for what became idle."""
        block, visit.leased = visit.leased, None
        if block is None:
            return False
        self._mover.part(block)
        self.leases[block] -= 1
        return self._pass_on(block) and bool(self.tickets)

    def _pass_on(self, block: int) -> bool:
        """Tell the mover that the first visitor entered a block, or the last one left it; say whether one left."""
        if self.leases[block] and block not in self._entered:
            self._entered.add(block)
            self._mover.enter(block)
        elif not self.leases[block] and block in self._entered:
            self._mover.leave(block)
            self._entered.discard(block)
            return True
        return False

    def take_back(self, visit: Visit, num_bytes: int) -> None:
        """Count bytes as free that a visit was lent."""
        visit.lent_bytes -= num_bytes
        self.room.release(num_bytes)

    # Tickets

    def withdraw(self, visit: Visit | None) -> None:
        """Drop what a visit waits for."""
        self.tickets = [ticket for ticket in self.tickets if ticket.visit is not visit]

    def grant(self) -> None:
        """Let in everybody whose block is there."""
        for ticket in list(self.tickets):
            if ticket.is_granted or ticket.error is not None or ticket.block is None:
                continue
            if self.is_open(ticket.block):
                self.lease(ticket.visit, ticket.block)
                self._let_in(ticket)

    def lend(self, ticket: Ticket) -> None:
        """Give a ticket the bytes it is for."""
        self.room.take(ticket.num_bytes)
        ticket.visit.lent_bytes += ticket.num_bytes
        self.most_lent_bytes = max(self.most_lent_bytes, ticket.num_bytes)
        self._count_peak()
        self._let_in(ticket)

    def refuse(self, ticket: Ticket, error: Exception) -> None:
        """Let whoever waits with a ticket raise an error."""
        ticket.error = error
        self._change.notify_all()

    def _let_in(self, ticket: Ticket) -> None:
        ticket.is_granted = True
        self.tickets.remove(ticket)
        self._change.notify_all()

    # Moves

    def begin(self, move: Move) -> None:
        """Note that a move is under way."""
        self.states[move.block] = State.FETCHING if move.is_fetch else State.EVICTING
        if move.is_fetch:
            self.room.enter(move.block)
            self._count_peak()
        else:
            self.closed.discard(move.block)

    def finish(self, move: Move, kept: int, failure: BaseException | None) -> None:
        """Note what became of a move.

        Args:
            move: ended.
            kept: bytes that an eviction had to leave where they are; all, where it failed.
            failure: what it raised; whoever waits for the block is told.
        """
        block = move.block
        if not move.is_fetch:
            self.states[block] = State.ABSENT
            self.counts.evictions += failure is None
            self.room.leave(block, kept if failure is None else self.sizes[block])
        elif failure is None and block not in self._stale:
            self.states[block] = State.RESIDENT
            self.counts.fetches += 1
            self.counts.fetched_bytes += self.sizes[block]
        else:
            self.states[block] = State.ABSENT
            self.room.cancel(block)
        self._stale.discard(block)
        if move.is_fetch and isinstance(failure, Exception):
            self._fail(block, failure)

    def _fail(self, block: int, failure: Exception) -> None:
        """Tell who waits, and fetch the block ahead no more; whoever enters it tries again and is told."""
        for ticket in self.tickets:
            if ticket.block == block and not ticket.is_granted:
                ticket.error = failure
        for visit in self.visits:
            visit.forget(block)

    def _count_peak(self) -> None:
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.room.used_bytes)

    # When all is not as it was

    def forget_copies(self) -> None:
        """Count as absent what an edit may have made stale, now or when it arrives. Nobody is inside."""
        for block, state in enumerate(self.states):
            if state is State.RESIDENT:
                self.states[block] = State.ABSENT
                self.room.leave(block, 0)
            elif state is State.FETCHING:
                self._stale.add(block)

    def recount(self) -> None:
        """Count leases and loans anew from what visits say, after an interruption between any two lines."""
        leases = Counter(visit.leased for visit in self.visits if visit.leased is not None)
        for block, count in enumerate(self.leases):
            if count != leases[block] or (block in self._entered) != (leases[block] > 0):
                self.leases[block] = leases[block]
                self._pass_on(block)
        self._recount_loans()

    def _recount_loans(self) -> None:
        self.room.release(self.room.lent_bytes - sum(visit.lent_bytes for visit in self.visits))

    def keep_thread(self, thread_id: int, change: Condition) -> None:
        """Forget, after a fork, every other thread and all blocks that this one is not inside of.

        Args:
            thread_id: of the only thread there is.
            change: on the lock that the child made itself.
        """
        self._change = change
        self.visits = [visit for visit in self.visits if visit.thread_id == thread_id and not visit.is_party]
        self.tickets.clear()
        self.closed.clear()
        self._stale.clear()
        inside = {visit.leased for visit in self.visits}
        for block, state in enumerate(self.states):
            self.leases[block] = sum(visit.leased == block for visit in self.visits)
            if block not in inside:
                if block in self._entered:
                    self._pass_on(block)
                if state is not State.ABSENT:
                    self.states[block] = State.ABSENT
                    self.room.leave(block, 0)
        self._recount_loans()
