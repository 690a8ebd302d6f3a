"""Choose how many micro-batches cross together: enough that fetching hides behind computing, as many as memory takes.

While a crossing boards, each micro-batch runs through the first block at once, which tells how long one takes; how
fast blocks come in is known from those fetched so far. What the first block stands for is learned from the crossing
before, and where threads waited for weights all the same, the next crossing takes more.

Guarantees at least one micro-batch, never more than a given width, and never one whose like would not fit the memory
for activations, as far as what those aboard took tells.

Concurrency: used by whoever has the convoy's baton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from lading.residency.members import Timing
from lading.residency.moving import Counts
from lading.residency.supply import Supply

_MOST = 64  # threads; each may have as many helpers of its own as torch has threads
_MARGIN = 1.25  # of computing over fetching, where a device fetches by itself
_MARGIN_ON_CPU = 4.0  # where fetching takes the processors that compute
_TROUBLE_S, _TROUBLE_SHARE = 4e-3, 0.02  # what each fetch costs computing on these, and how much of it may be so
_MORE, _MOST_OF_IT = 1.5, 4.0  # how much longer crossings become where threads waited all the same
_WAITED_SHARE = 0.01  # of a crossing: more is not hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvoyStats:
    """Say what a convoy did so far. Immutable.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> with lading.offload(net, {"": "disk"}), lading.convoy(net, [torch.ones(1, 64)] * 6, width=3) as outputs:
        ...     _ = list(outputs)
        ...     outputs.stats().crossings, outputs.stats().width
        (2, 3)
    """

    batches: int
    """Through the model."""
    crossings: int
    """0 where the model is called batch by batch, because nothing of it streams."""
    width: int
    """Micro-batches of the widest crossing."""
    run_s: float
    """Seconds that micro-batches computed."""
    wait_s: float
    """Seconds in which nobody computed because weights were on their way."""
    fetched_bytes: int
    bound: str
    """``"compute"`` where crossings waited for weights for at most 1 % of their time, else ``"reading"``."""
    limited_by: str
    """Why the widest crossing took no more micro-batches: ``"enough"``, ``"width"`` (given), ``"memory"``,
    ``"threads"``, ``"batches"``, where there were no more, or ``"resident"``, where one goes after the other."""

    def __str__(self) -> str:
        return (
            f"{self.batches} batches in {self.crossings} crossings, {self.width} in the widest (limited by: "
            f"{self.limited_by}); computed {self.run_s:.2f} s, waited {self.wait_s:.2f} s for weights (bound: "
            f"{self.bound})"
        )


class Width:
    """Say whether another micro-batch comes along. See the head of this file.

    Args:
        given: by the caller; None to choose.
        supply: of the residency.
        is_one_call: whether each batch is one call of the model: else the first block of many does not tell how long
            they take, and until a crossing has been seen, all come along that may.
    """

    def __init__(self, given: int | None, supply: Supply, *, is_one_call: bool) -> None:
        self._given = given
        self._supply = supply
        self._is_one_call = is_one_call
        self._stretch = 1.0
        """How much longer a crossing computes than should do: more where threads waited all the same."""
        self._learned: tuple[float, int, float] | None = None
        """Bytes and blocks that the last crossing fetched, and how much longer a micro-batch took than in its first."""
        self._first_block_s: float | None = None
        """How long that was, on average."""
        self.first_block = 0
        """The block that this crossing opened first."""
        self._batches = self._crossings = 0
        self._run_s = self._wait_s = 0.0
        self._aboard: list[Timing] = []
        self._limited_by = "batches"
        self._widest = (0, "batches")
        self._is_hidden = True
        self._begun_bytes = self._begun_fetches = self._fetched_bytes = 0
        self._begun_used_bytes = 0

    @property
    def settle(self) -> Callable[[], None] | None:
        """Give what waits for a device: else nobody knows how long a first block takes. None where nothing is to."""
        return self._supply.settle

    def begin(self, counts: Counts) -> None:
        """Note that a crossing begins."""
        self._aboard = []
        self._begun_bytes, self._begun_fetches = counts.fetched_bytes, counts.fetches
        self._begun_used_bytes = self._supply.used_bytes()
        self._limited_by = "batches"

    def note(self, timing: Timing) -> None:
        """Note that a micro-batch came along."""
        self._aboard.append(timing)

    def wants_more(self) -> bool:
        """Say whether one more should come along; asked when all aboard wait for their second block, or have none."""
        found = self._limit()
        self._limited_by = found or "batches"
        return found is None

    def _limit(self) -> str | None:
        count = len(self._aboard)
        if self._given is not None:
            return "width" if count >= self._given else None
        if count >= _MOST:
            return "threads"
        used_bytes = self._supply.used_bytes() - self._begun_used_bytes
        if count and used_bytes * (count + 1) > self._supply.activation_bytes * count:
            return "memory"
        return "enough" if count >= self._needed() else None

    def _needed(self) -> float:
        """Say how many micro-batches' computing hides the fetching of one crossing."""
        rate = self._supply.pace.bytes_per_s
        timed = [timing.first_block_s for timing in self._aboard if timing.first_block_s is not None]
        first_s = sum(timed) / len(timed) if timed else self._first_block_s
        if first_s is None:
            return 1 if self._is_one_call else inf
        if rate is None or (self._learned is None and not self._is_one_call):
            return inf
        if self._learned is not None:
            num_bytes, num_fetches, ratio = self._learned
        else:
            num_bytes, num_fetches = sum(self._supply.sizes), sum(size > 0 for size in self._supply.sizes)
            ratio = num_bytes / max(1, self._supply.sizes[self.first_block])
        wanted_s = _MARGIN * num_bytes / rate
        if self._supply.settle is None:
            wanted_s = max(_MARGIN_ON_CPU * num_bytes / rate, num_fetches * _TROUBLE_S / _TROUBLE_SHARE)
        return self._stretch * wanted_s / max(ratio * first_s, 1e-9)

    def end(self, counts: Counts) -> None:
        """Note that a crossing is over, and learn from it."""
        fetched, num_fetches = counts.fetched_bytes - self._begun_bytes, counts.fetches - self._begun_fetches
        self._fetched_bytes += fetched
        self._batches += len(self._aboard)
        self._crossings += 1
        run_s = sum(timing.run_s for timing in self._aboard)
        wait_s = sum(timing.wait_s for timing in self._aboard)
        self._run_s += run_s
        self._wait_s += wait_s
        if len(self._aboard) >= self._widest[0]:
            self._widest = len(self._aboard), self._limited_by
        if self._supply.settle is not None:  # a device computes and waits where the host does not see it
            self._is_hidden = len(self._aboard) * _MARGIN >= self._needed()  # without a margin
            return
        self._is_hidden = self._wait_s <= _WAITED_SHARE * (self._run_s + self._wait_s)
        first_s = sum(timing.first_block_s or 0.0 for timing in self._aboard)
        if first_s:
            self._learned = fetched, num_fetches, run_s / first_s
            self._first_block_s = first_s / len(self._aboard)
        if wait_s > _WAITED_SHARE * (run_s + wait_s) and self._limited_by == "enough":
            self._stretch = min(self._stretch * _MORE, _MOST_OF_IT)

    def stats(self) -> ConvoyStats:
        """Give a snapshot."""
        return ConvoyStats(
            batches=self._batches,
            crossings=self._crossings,
            width=self._widest[0],
            run_s=self._run_s,
            wait_s=self._wait_s,
            fetched_bytes=self._fetched_bytes,
            bound="compute" if self._is_hidden else "reading",
            limited_by=self._widest[1],
        )
