"""Take inputs to where a module runs and outputs back to the caller, through any nesting of containers.

Knows devices and torch's registry of containers (``torch.utils._pytree``: lists, tuples, dicts, model outputs); what is
in none of them is not looked into.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lading.errors import ResidencyError, refusal
from lading.residency.hooks import Arguments, Stay
from lading.residency.visits import Visit


def moved(nested: Any, device: torch.device) -> Any:
    """Give the same nesting with every tensor on a device; what is there already stays itself."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), nested)


def tensors_in(nested: Any) -> list[torch.Tensor]:
    """List the tensors of a nesting."""
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class DoorEscort:
    """Bring a call's tensors to the device where the model begins, and its output to where the first of them was.

    Args:
        device: the main device.
        skip_keys: names of arguments that stay where they are, such as caches.
        is_returning: whether outputs go back to the caller's device.
    """

    def __init__(self, device: torch.device, skip_keys: Collection[str], *, is_returning: bool) -> None:
        self._device = device
        self._skip_keys = frozenset(skip_keys)
        self._is_returning = is_returning
        self._callers = threading.local()

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Move the arguments, and remember the device of the first tensor."""
        args, kwargs = arguments
        given = tensors_in((args, kwargs))
        self._callers.device = given[0].device if given else None
        return (moved(args, self._device), _except(kwargs, self._skip_keys, self._device)), None

    def depart(self, output: Any) -> Any:
        """Move the output back."""
        device = getattr(self._callers, "device", None)
        return output if device is None or not self._is_returning else moved(output, device)


class BlockEscort:
    """Bring tensors to where a block runs, and refuse what would be wrong in a slot.

    Args:
        device: the block's execution device.
        skip_keys: names of arguments that stay where they are.
        weights: of a block that runs from a slot; none for one that is always there.
        slots: addresses of the slots' storages.
    """

    def __init__(
        self,
        device: torch.device,
        skip_keys: Collection[str],
        weights: Sequence[nn.Parameter] = (),
        slots: Collection[int] = (),
    ) -> None:
        self._device = device
        self._slots = frozenset(slots)
        self._skip_keys = frozenset(skip_keys)
        self._weights = tuple(weights)

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Move the arguments.

        Raises:
            ResidencyError: gradients would be recorded through a slot, whose content changes before they are computed.
        """
        args, kwargs = arguments
        if self._weights and torch.is_grad_enabled():
            recorded = [*self._weights, *tensors_in((args, kwargs))]
            if any(tensor.requires_grad for tensor in recorded):
                raise ResidencyError(
                    refusal(
                        "a forward through streamed weights",
                        found="gradients recorded, though the weights will be others' by the time of backward",
                        expected="no gradients: a reused slot would give wrong ones without an error",
                        way_out="call the model inside torch.no_grad(), or train it on the CPU",
                    )
                )
        return (moved(args, self._device), _except(kwargs, self._skip_keys, self._device)), None

    def depart(self, output: Any) -> Any:
        """Copy what an output shows of the slot itself: a block may return a view of its weight."""
        if not any(self._is_in_slot(tensor) for tensor in tensors_in(output)):
            return None
        return pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.clone() if self._is_in_slot(tensor) else tensor, output
        )

    def _is_in_slot(self, tensor: torch.Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._slots


class TableEscort:
    """Gather rows of an embedding table where it rests, and bring them to the execution device.

    Args:
        home: where the table rests.
        device: where the rows are needed.
        rows: lends room for rows that rest on disk; None for a table in memory.
    """

    def __init__(self, home: torch.device, device: torch.device, rows: Any = None) -> None:
        self._home = home
        self._device = device
        self._rows = rows

    def arrive(self, visit: Visit, arguments: Arguments) -> tuple[Arguments | None, Stay | None]:
        """Bring the ids to the table."""
        here: Arguments = moved(arguments, self._home)
        stay = None if self._rows is None else self._rows.arrive(visit, here)[1]
        return here, stay

    def depart(self, output: Any) -> Any:
        """Bring the rows to the execution device."""
        return moved(output, self._device)


def _except(kwargs: dict[str, Any], skip_keys: frozenset[str], device: torch.device) -> dict[str, Any]:
    return {key: value if key in skip_keys else moved(value, device) for key, value in kwargs.items()}
