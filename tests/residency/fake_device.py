"""Stand in for an accelerator: streams whose work happens when a test lets it, memory that is poison until written.

`FakeDevice` keeps a queue for the copying stream and one for each computing thread. Work in a queue runs in order;
queues run in any order that marks allow, so `run` with a seeded generator tries interleavings that a real device may
take.
`LazyDevice` is the same without threads' queues, for whole models on the CPU: copies happen when somebody computes.
"""

from __future__ import annotations

import random
import threading
from collections import deque

import torch

POISON = 0xFF


class FakeDevice:
    def __init__(self, seed: int = 0, *, can_pin: bool = True) -> None:
        self.device = torch.device("cpu")
        self.random = random.Random(seed)
        self.can_pin = can_pin
        self.pinned: set[int] = set()
        self.queues: dict[object, deque] = {"copies": deque()}
        self.reached: set[int] = set()
        self.num_marks = 0
        self.reads: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def pin(self, tensor: torch.Tensor) -> bool:
        if self.can_pin:
            assert tensor.data_ptr() not in self.pinned, "pinned twice"
            self.pinned.add(tensor.data_ptr())
        return self.can_pin

    def unpin(self, tensor: torch.Tensor) -> None:
        self.pinned.remove(tensor.data_ptr())

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not self.can_pin:  # as a driver does with memory that it cannot read by itself
            source = source.clone()
        self.queues["copies"].append(lambda: target.copy_(source))

    def _mark(self, queue: object) -> int:
        self.num_marks += 1
        mark = self.num_marks
        self.queues.setdefault(queue, deque()).append(lambda: self.reached.add(mark))
        return mark

    def copied(self) -> int:
        return self._mark("copies")

    def computed(self) -> int:
        return self._mark(threading.get_ident())

    def hold_copies(self, mark: int) -> None:
        self.queues["copies"].append(mark)

    def hold_compute(self, mark: int) -> None:
        self.queues.setdefault(threading.get_ident(), deque()).append(mark)

    def compute(self, weight: torch.Tensor, queue: object = None) -> torch.Tensor:
        """Queue a kernel that reads a weight; returns where its result will be."""
        result = torch.empty_like(weight)
        self.queues.setdefault(queue or threading.get_ident(), deque()).append(lambda: result.copy_(weight))
        return result

    def wait(self, mark: int) -> None:
        while mark not in self.reached:
            assert self.step(), "a mark that nothing will reach: deadlock"

    def step(self) -> bool:
        """Run the head of one queue that may run; False where none may."""
        ready = [queue for queue in self.queues.values() if queue and (callable(queue[0]) or queue[0] in self.reached)]
        if not ready:
            return False
        work = self.random.choice(ready).popleft()
        if callable(work):
            work()
        return True

    def run(self, num_steps: int | None = None) -> None:
        while num_steps is None or num_steps > 0:
            if not self.step():
                break
            num_steps = None if num_steps is None else num_steps - 1
        if num_steps is None:
            assert not any(self.queues.values()), "work that can never run: deadlock"


class LazyDevice:
    """Copy as late as a device may: when somebody computes after the copy's mark. Any thread."""

    def __init__(self, *, can_pin: bool = True) -> None:
        self.device = torch.device("cpu")
        self.can_pin = can_pin
        self.pinned: set[int] = set()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_done = 0
        self.num_bytes = 0
        self.allocated: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(torch.full((num_bytes,), POISON, dtype=torch.uint8))
        return self.allocated[-1]

    def pin(self, tensor: torch.Tensor) -> bool:
        if self.can_pin:
            self.pinned.add(tensor.data_ptr())
        return self.can_pin

    def unpin(self, tensor: torch.Tensor) -> None:
        self.pinned.remove(tensor.data_ptr())

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.lock:
            self.copies.append((target, source if self.can_pin else source.clone()))
            self.num_bytes += len(source)

    def copied(self) -> int:
        with self.lock:
            return len(self.copies)

    def computed(self) -> int:
        return 0  # the CPU computes at once

    def hold_copies(self, mark: int) -> None:
        pass

    def hold_compute(self, mark: int) -> None:
        self.wait(mark)

    def wait(self, mark: int) -> None:
        with self.lock:
            while self.num_done < mark:
                target, source = self.copies[self.num_done]
                target.fill_(POISON)
                target.copy_(source)
                self.copies[self.num_done] = (target[:0], source[:0])
                self.num_done += 1
