"""Take along what a call finds around it: what torch and Python keep for each thread, and what they keep for all.

Kept for each thread: grad and inference mode, autocast, default device, context variables (captures among them), how
many threads torch computes with, the accelerator's current device and stream. An `Ambience` is taken in one thread and
entered in another. Kept for all: the states of random generators and the default dtype. `Luggage` holds one
micro-batch's of these while others have theirs. What else a thread may hold (dispatch modes, hooks for saved tensors,
Python's and NumPy's random states) stays behind.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

Result = TypeVar("Result")
_CPU = torch.device("cpu")


class Ambience:
    """Hold what the thread that makes it finds around it. Immutable; entered once."""

    def __init__(self) -> None:
        self._num_threads = torch.get_num_threads()
        self._is_grad_enabled = torch.is_grad_enabled()
        self._is_inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device()
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._stream = None if kind is None else torch.accelerator.current_stream()
        self._autocasts = [
            (name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name))
            for name in ("cpu", *([] if kind is None else [kind.type]))
        ]
        self._caches_casts = torch.is_autocast_cache_enabled()
        self._context = contextvars.copy_context()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in this ambience, in any thread."""
        return self._context.run(self._run, function)

    def _run(self, function: Callable[[], Result]) -> Result:
        if torch.get_num_threads() != self._num_threads:  # to ask sets a new thread up
            torch.set_num_threads(self._num_threads)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._is_inference))
            stack.enter_context(torch.set_grad_enabled(self._is_grad_enabled))
            for kind, dtype, is_enabled in self._autocasts:
                if is_enabled:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._caches_casts))
            if self._device != torch.get_default_device():
                stack.enter_context(self._device)
            if self._stream is not None:
                stack.enter_context(self._stream)
            return function()


class Luggage:
    """Hold the states of random generators and the default dtype of whoever does not run now. One thread at a time.

    Args:
        devices: with generators of their own.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(device for device in devices if device != _CPU)
        self.pack()

    def pack(self) -> None:
        """Take what is there."""
        self._dtype = torch.get_default_dtype()
        self._state = torch.get_rng_state()
        self._states = [torch.get_device_module(each).get_rng_state(each) for each in self._devices]

    def unpack(self) -> None:
        """Put back what was taken."""
        if self._dtype != torch.get_default_dtype():
            torch.set_default_dtype(self._dtype)
        torch.set_rng_state(self._state)
        for device, state in zip(self._devices, self._states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
