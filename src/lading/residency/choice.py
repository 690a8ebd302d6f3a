"""Choose what is fetched or evicted next.

Knows what the ledger says; moves nothing, waits for nothing, and keeps nothing between two calls. Tickets come first,
in the order in which they were drawn; then what will be needed soonest is fetched ahead. What makes way is the block
whose next use is furthest.

Guarantees progress: while a ticket is unserved there is a move to make, one under way, a block closed for it that
empties in time or a loan that ends in time; else the ticket is refused.

Concurrency: called under the schedule's lock.
"""

from __future__ import annotations

from itertools import islice

from lading.errors import ResidencyError
from lading.residency.ledger import Ledger
from lading.residency.moving import Move, State
from lading.residency.visits import Ticket, Visit, leaders, upcoming

_LOOKAHEAD = 256  # blocks; what is needed after these counts as never needed again


def next_move(ledger: Ledger) -> Move | None:
    """Choose a block and whether to fetch it, else to evict it; None while there is nothing to do.

    On the way, tickets that need no move are served, and a block that is in the way of one that does is closed.
    """
    ranks: dict[int, int] = {}
    ahead = leaders(ledger.visits)
    for needed in islice(upcoming(ahead), _LOOKAHEAD):
        ranks.setdefault(needed, len(ranks))
    for ticket in list(ledger.tickets):
        if ticket.error is not None or ticket.is_granted:
            continue
        block = ticket.block
        if block is not None and ledger.states[block] is not State.ABSENT:
            if ledger.states[block] is State.RESIDENT:  # closed for somebody who has been served by now
                ledger.closed.discard(block)
                ledger.grant()
            continue
        way = ledger.room.make_way(block, ticket.num_bytes, _idle(ledger, ranks, -1))
        if way:
            return Move(way[0], is_fetch=False)
        if way is None:
            if _make_room_for(ledger, ticket, ranks):
                continue
            return None
        if block is not None:
            return Move(block, is_fetch=True)
        ledger.lend(ticket)
    ledger.closed.clear()
    return _ahead(ledger, ranks, ahead)


def _make_room_for(ledger: Ledger, ticket: Ticket, ranks: dict[int, int]) -> bool:
    """Close a block that is in the way; where nothing can ever make way, refuse the ticket: True."""
    if ledger.is_moving:
        return False
    leased = [block for block, count in enumerate(ledger.leases) if count]
    in_the_way = ledger.room.obstacles(ticket.block, leased)
    if in_the_way:
        open_ones = [block for block in in_the_way if block not in ledger.closed]
        if len(open_ones) == len(in_the_way):
            ledger.closed.add(max(open_ones, key=lambda block: ranks.get(block, len(ranks))))
        return False
    if ledger.room.lent_bytes:
        return False
    ledger.refuse(ticket, ResidencyError(ledger.room.refusal(ticket.num_bytes)))
    return True


def _ahead(ledger: Ledger, ranks: dict[int, int], ahead: list[Visit]) -> Move | None:
    """Choose what to fetch ahead: the next absent block, if nothing that is needed before it has to go.

    Where anything at all has to go, only what is entered next: fetched earlier, it would take the place of what this
    forward began with, and the next one would find nothing left. A convoy may be entering the block that is counted
    first, one after the other: for it, what comes after that is next. What micro-batches enter only after others have
    borrowed room for rows is fetched where it fits beside such a loan, else each loan would have it fetched once more.
    """
    num_next = sum(1 if visit.party is None else 2 for visit in ahead)
    before_loans = {
        block
        for visit in ahead
        if visit.party is None or not visit.party.is_boarding
        for block in (visit.ahead if visit.party is None else visit.sure)
    }
    for block, rank in ranks.items():
        if ledger.states[block] is not State.ABSENT:
            continue
        way = ledger.room.make_way(block, ledger.sizes[block], _idle(ledger, ranks, rank))
        if way is None or (way and rank >= num_next):
            return None
        beside_a_loan = ledger.sizes[block] + ledger.most_lent_bytes
        if block not in before_loans and ledger.room.make_way(block, beside_a_loan, ()) is None:
            return None
        return Move(way[0], is_fetch=False) if way else Move(block, is_fetch=True)
    return None


def _idle(ledger: Ledger, ranks: dict[int, int], rank: int) -> list[int]:
    """List resident blocks with nobody inside, needed after ``rank`` or not at all, furthest use first."""
    never = len(ledger.sizes) + len(ranks)
    idle = [
        block
        for block, state in enumerate(ledger.states)
        if state is State.RESIDENT and not ledger.leases[block] and ranks.get(block, never) > rank
    ]
    return sorted(idle, key=lambda block: ranks.get(block, never), reverse=True)
