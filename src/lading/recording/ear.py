"""What the hook at a site needs of a capture, found as fast as can be.

torch's way to call a hook costs twice an empty module. What the hook does itself is kept to one look-up for each
capture that listens, and one entry in its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from lading.recording.log import Row
from lading.recording.sites import Site


@dataclass(slots=True, eq=False)
class Ear:
    """Stand for a capture where it listens. Written when its capture opens and closes; read from any thread."""

    note: Callable[[Row], None]
    """The log's."""
    keep: Callable[[torch.Tensor], torch.Tensor]
    is_bare: bool
    """Whether a tensor without gradients is kept as it is, so that nothing need be called for it."""
    sites: dict[int, list[Site]] = field(default_factory=dict)
    """By the identity of their module, while the capture is open."""
    whole: dict[int, str] = field(default_factory=dict)
    """Of these the names of such as are alone at their module, and all of its output, kept as it is."""
    is_closed: bool = False

    def open(self, sites: Iterable[Site], others: Iterable[nn.Module], *, is_whole: bool) -> list[nn.Module]:
        """Begin to listen at sites, and at modules whose calls mean something else too; list the modules of all."""
        modules = {id(module): module for module in others}
        busy = set(modules)
        self.sites.update({key: [] for key in busy})
        for site in sites:
            modules[id(site.module)] = site.module
            self.sites.setdefault(id(site.module), []).append(site)
        for key, found in self.sites.items() if is_whole else ():
            if key not in busy and len(found) == 1 and found[0].side == "output" and found[0].element is None:
                self.whole[key] = found[0].name
        return list(modules.values())

    def close(self) -> None:
        """Listen no more."""
        self.is_closed = True
        self.whole.clear()
        self.sites.clear()
