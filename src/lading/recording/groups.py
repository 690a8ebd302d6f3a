"""Name several sites together, as architectures do: hidden states, attentions, router scores. Pure records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lading.recording.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Several sites whose tensors make one tuple, in the order of the calls. Immutable."""

    name: str
    """Such as ``"hidden_states"``; with the path of its model before it where there are several."""
    owner: nn.Module
    """The model that declares it: each of its calls makes one tuple."""
    first: Site | None
    """What comes before the members: the input of the first of them."""
    members: tuple[Site, ...]
    last: Site | None
    """What stands in place of the last member's tensor: the model's own output, behind its final norm."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """List all of them."""
        return tuple(site for site in (self.first, *self.members, self.last) if site is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing heard. Immutable."""

    name: str
    """A site's, or the group's where a call of its owner ended."""
    tensor: torch.Tensor | None
    """None for such an end."""
    call: int | None
    """Which call of the captured model it was in; None: in none that this thread knew of."""


@dataclass(slots=True)
class _Begun:
    """A call of a group's owner that has not ended. One thread."""

    first: torch.Tensor | None = None
    members: list[torch.Tensor] = field(default_factory=list)
    last: torch.Tensor | None = None

    def closed(self) -> tuple[torch.Tensor, ...]:
        members = self.members if self.last is None else [*self.members[:-1], self.last]
        return (*([] if self.first is None else [self.first]), *members)


def assemble(group: Group, events: Sequence[Event]) -> list[tuple[torch.Tensor, ...]]:
    """Make a tuple of each call of a group's owner, in the order in which they ended; cut short ones come last.

    Calls of the captured model may overlap in time, where functions bound to the capture run in several threads; they
    are told apart by their numbers, unless layers ran in threads that know of none.
    """
    members = {site.name for site in group.members}
    is_apart = all(event.call is not None for event in events if event.name in members)
    begun: dict[int | None, _Begun] = {}
    ended: list[tuple[torch.Tensor, ...]] = []
    for event in events:
        key = event.call if is_apart else None
        call = begun.setdefault(key, _Begun())
        if event.tensor is None:
            if call.members:
                ended.append(call.closed())
            del begun[key]
        elif event.name in members:
            call.members.append(event.tensor)
        elif group.last is not None and event.name == group.last.name:
            call.last = event.tensor
        elif call.first is None:
            call.first = event.tensor
    return ended + [call.closed() for call in begun.values() if call.members]
