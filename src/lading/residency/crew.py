"""Lead micro-batches across a model together: each block is opened once for all of them, then the next one.

A crossing takes micro-batches aboard, runs each up to its first streamed block, and opens that; when all that waited
for it are through, the block at which somebody is furthest behind is next. What nobody waits for is never opened, and
who ends early leaves: nothing can wait for ever, however a model chooses its way. Blocks are fetched and evicted by the
schedule as always; micro-batches that wait hold nothing of it.

Concurrency: everything is touched by whoever has the baton; see `members`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lading.errors import ResidencyError, refusal
from lading.residency.ambience import Ambience
from lading.residency.hooks import Hooks
from lading.residency.members import Job, Member, Seat
from lading.residency.schedule import Schedule
from lading.residency.visits import Visit
from lading.residency.watch import Watch
from lading.residency.width import ConvoyStats, Width

_LOOK_S = 0.5  # how often the leader looks whether whoever runs gets on


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossings:
    """Say how micro-batches cross. Immutable."""

    call: Callable[[Any], Any]
    """What is called with each batch; it may call the model any number of times."""
    seeds: Callable[[int], int]
    """The seed of a batch, by its place."""
    patience_s: float
    """How long code of the model's may stand still, using no processor, before it counts as waiting for ever."""


class Crew:
    """Lead members over one crossing after the other: what is behind a `Convoy`. See the head of this file."""

    def __init__(
        self,
        hooks: Hooks,
        schedule: Schedule,
        crossings: Crossings,
        devices: Sequence[torch.device],
        width: Width,
    ) -> None:
        self._hooks = hooks
        self._schedule = schedule
        self._crossings = crossings
        self._devices = devices
        self._width = width
        self._leader = Seat(devices)
        self._is_leading = True
        """Whether the leader has the baton, as far as an interruption of it let it note."""
        self._members: list[Member] = []
        self._aboard: list[Member] = []
        self._party: Visit | None = None
        self._open_block: int | None = None
        self.is_ending = self.is_abandoned = False
        self.may_board = True
        """Whether there may be more batches."""
        self.done: dict[int, Job] = {}
        """Micro-batches that are through, until their outputs are handed out."""
        self.next_index = 0
        """The batch whose output is handed out next."""

    @property
    def is_empty(self) -> bool:
        """Say whether no micro-batch is aboard."""
        return not self._aboard

    @property
    def leader_id(self) -> int | None:
        """Give the thread whose crossing is under way."""
        return None if self._party is None else self._party.thread_id

    @property
    def wants_more(self) -> bool:
        """Say whether another micro-batch should come along now."""
        if not self.may_board or self.is_ending:
            return False
        if self._party is None:
            return True
        return self._party.is_boarding and self._width.wants_more()

    def stats(self) -> ConvoyStats:
        """Say what happened so far."""
        return self._width.stats()

    # The leader's

    def board(self, index: int, batch: Any) -> None:
        """Take a micro-batch aboard; the first one begins a crossing.

        Raises:
            ResidencyError: the residency was closed, or this thread is editing.
            CorruptShardError: a file behind the weights was changed in place.
        """
        if self._party is None:
            outer = self._hooks.caller.companion  # this convoy is inside a call of another
            around = None if outer is None else outer.party
            self._party = Visit(None, (), party=around, is_party=True)
            try:
                self._schedule.begin_party(self._party)
            except BaseException:
                self._schedule.end(self._party, is_complete=False)
                self._party = None
                raise
            self._open_block = None
            self._width.begin(self._schedule.counts)
        idle = [member for member in self._members if member.job is None]
        if not idle:
            seat = Seat(self._devices)
            idle = [Member(self, seat, self._the_party, self._width.settle, self._greet)]
            self._members += idle
        ambience = Ambience()
        call = partial(ambience.run, partial(self._crossings.call, batch))
        job = Job(index=index, call=call, seed=self._crossings.seeds(index))
        idle[0].board(job)
        self._width.note(job.timing)
        self._aboard += idle[:1]

    def _the_party(self) -> Visit:
        assert self._party is not None, "members run inside a crossing"
        return self._party

    def _greet(self, member: Member) -> Callable[[], None]:
        caller = self._hooks.caller
        caller.companion = member
        return lambda: caller.unwind(0)

    def go_on(self) -> None:
        """Let members run until the leader is needed: an output is there, more may board, or all are through.

        Raises:
            ResidencyError: one of them waits for something that will not come.
        """
        seat = self.next_seat()
        if seat is not self._leader:
            self._leader.luggage.pack()
            self._is_leading = False
            seat.call()
            self._await()
            self._take_up()
        if self.is_empty and self._party is not None:
            self._end_crossing()

    def _end_crossing(self) -> None:
        if self._party is not None:
            self._schedule.end(self._party, is_complete=False)
            self._party = None
            self._width.end(self._schedule.counts)

    def _await(self) -> None:
        watch = Watch(self._crossings.patience_s)
        while not self._leader.take(_LOOK_S):
            running = next((member for member in self._aboard if not member.is_waiting), None)
            place = None if running is None else watch.look(running.thread)
            if running is not None and place is not None:
                self._give_up(running)
                raise ResidencyError(
                    refusal(
                        "a convoy",
                        found=f"a micro-batch that waits at {place} while {len(self._aboard)} others wait for their "
                        f"turns: for {self._crossings.patience_s:g} s it has not computed",
                        expected="model code that waits for no other batch: no barrier, no lock kept across blocks",
                        way_out="call the model batch by batch, or raise patience_s if it waits for something else",
                    )
                )

    def _take_up(self) -> None:
        self._is_leading = True
        self._leader.luggage.unpack()

    def _give_up(self, member: Member) -> None:
        """Go on without a member that does not come back; it holds nothing from now on."""
        member.is_lost = True
        self._aboard.remove(member)
        self._members.remove(member)
        self._schedule.end_thread(member.thread.ident)
        self._leader.luggage.unpack()

    def end(self) -> None:
        """Have everybody aboard leave the model, and end the threads. Again after an interruption, wherever it was."""
        self.is_ending = True
        if not self._is_leading:
            while not self._leader.take(_LOOK_S) and not self._is_baton_lost:
                pass
            self._take_up()
        while not self.is_empty:
            self.go_on()
        self._end_crossing()
        self.dismiss()

    def dismiss(self) -> None:
        """End the threads, while nobody is aboard."""
        while self._members:
            self._members[-1].dismiss()
            self._members.pop()

    @property
    def _is_baton_lost(self) -> bool:
        """Say whether an interruption of the leader left the baton with nobody."""
        return all(member.is_waiting and not member.seat.is_called for member in self._members)

    def abandon(self) -> None:
        """Let all threads end by themselves: nobody iterates any more. Does not wait; safe in a finalizer."""
        self.is_ending = self.is_abandoned = True
        if self._party is not None and not self._aboard:
            self._party.is_party = False  # an interrupted thread's, which whoever waits ends
        idle = [member for member in self._members if member.job is None]
        first = self._aboard[:1] if self._is_leading or self._is_baton_lost else []
        for member in (*idle, *first):
            if not member.seat.is_called:
                member.seat.call()

    # Whoever has the baton

    def next_seat(self) -> Seat:
        """Choose who goes on."""
        fresh = [member for member in self._aboard if member.block is None]
        if self.is_ending:
            if self.is_abandoned and not self._aboard:
                self._end_crossing()
            return self._aboard[0].seat if self._aboard else self._leader
        if fresh:
            return fresh[0].seat
        if self.next_index in self.done:
            return self._leader
        here = [member for member in self._aboard if member.block == self._open_block]
        if not here:
            if not self._aboard or self.wants_more:
                return self._leader
            behind = min(self._aboard, key=lambda member: member.place)
            assert behind.block is not None, "who has not come to a block yet goes first"
            if self._open_block is None:
                self._width.first_block = behind.block
            else:
                self._the_party().is_boarding = False
            self._open_block = behind.block
            here = [member for member in self._aboard if member.block == self._open_block]
        return here[0].seat

    def note_done(self, member: Member) -> None:
        """Put a micro-batch that is through aside for the leader."""
        job, member.job = member.job, None
        self._aboard.remove(member)
        assert job is not None, "only a member with a micro-batch can be done"
        if not self.is_ending:
            self.done[job.index] = job
