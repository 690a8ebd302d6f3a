"""Look at the places of a module that hold tensors, and put others there.

Knows modules, not checkpoints. Thread rule: one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lading.checkpoint.mapping import ShardMapping
from lading.errors import MissingTensorError, name_list, refusal


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a module that holds a parameter or a persistent buffer."""

    owner: nn.Module
    attribute: str
    is_parameter: bool

    def get(self) -> torch.Tensor:
        """Give the tensor in this place."""
        held = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.attribute]
        assert held is not None
        return held

    def put(self, tensor: torch.Tensor) -> None:
        """Put another tensor in this place."""
        if type(self.owner).__setattr__ is not nn.Module.__setattr__:
            setattr(self.owner, self.attribute, tensor)  # such as nn.LSTM, which keeps a list of its weights
        elif self.is_parameter:
            assert isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.attribute] = tensor
        else:
            self.owner._buffers[self.attribute] = tensor


def slots_of(module: nn.Module, prefix: str) -> dict[str, Slot]:
    """List a module's own slots by full name, without its children's."""
    own = {f"{prefix}{name}": Slot(module, name, True) for name, held in module._parameters.items() if held is not None}
    for name, held in module._buffers.items():
        if held is not None and name not in module._non_persistent_buffers_set:
            own[f"{prefix}{name}"] = Slot(module, name, False)
    return own


def remember(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Register on ``undo`` what puts every slot of these modules back."""
    parts = [(part, dict(part._parameters), dict(part._buffers)) for part in modules]
    data = [
        (held, held.data)
        for _, parameters, buffers in parts
        for held in (*parameters.values(), *buffers.values())
        if held is not None and not held.is_meta
    ]

    def restore() -> None:
        for tensor, values in data:
            tensor.data = values
        for part, parameters, buffers in parts:
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)
            if type(part).__setattr__ is not nn.Module.__setattr__:
                for name, held in parameters.items():
                    setattr(part, name, held)

    undo.callback(restore)


def shape_refusal(subject: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """Compose the message about a tensor of another shape than its place has."""
    return refusal(
        subject,
        found=f"shape {list(found)}",
        expected=f"shape {list(expected)}",
        way_out="it is transposed" if list(found) == list(expected)[::-1] else "use the checkpoint's own configuration",
    )


def settle_bytes(module: nn.Module, mappings: Mapping[Path, ShardMapping], subject: str) -> tuple[int, int]:
    """Refuse a module with a tensor that has no data; count the bytes of one that is whole.

    Returns:
        Storage bytes that are views of the mapped files, and those that are not; shared ones once.

    Raises:
        MissingTensorError: naming the parameters and buffers on meta.
    """
    empty: list[str] = []
    storages: dict[int, int] = {}
    for path, part in module.named_modules():
        for name, held in (*part._parameters.items(), *part._buffers.items()):
            if held is None:
                continue
            if held.is_meta:
                empty.append(f"{path}.{name}" if path else name)
            elif held.numel() and _has_storage(held):
                storage = held.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    if empty:
        raise MissingTensorError(
            refusal(
                subject,
                found=f"{name_list(empty)} still on meta after loading",
                expected="real tensors only",
                way_out="build the module inside `with lading.empty():`, which keeps its buffers real",
            )
        )
    spans = [mapping.span for mapping in mappings.values()]
    mapped = sum(size for start, size in storages.items() if any(low <= start < high for low, high in spans))
    return mapped, sum(storages.values()) - mapped


def _has_storage(held: torch.Tensor) -> bool:
    """Say whether a tensor is plain memory: a quantizer's subclass may hold its data elsewhere."""
    return type(held) in (nn.Parameter, torch.Tensor) or type(held.data) is torch.Tensor
