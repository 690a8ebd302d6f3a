"""Name several sites together, as architectures do: hidden states, attentions, router scores. A record, no more."""

from __future__ import annotations

from dataclasses import dataclass

from lading.recording.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Several sites whose tensors make one tuple, in the order of the calls. Immutable."""

    name: str
    """Such as ``"hidden_states"``; with the path of its model before it where there are several."""
    first: Site | None
    """What comes before the members: the input of the first of them."""
    members: tuple[Site, ...]
    last: Site | None
    """What stands in place of the last member's tensor: the model's own output, behind its final norm."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """List all of them."""
        return tuple(site for site in (self.first, *self.members, self.last) if site is not None)
