"""Hold the names that a checkpoint has against those that a model needs, as strictly as was asked.

Knows names and where they stand, no tensor and no architecture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lading.errors import CheckpointError, MissingTensorError, name_list, refusal
from lading.names import folded

_LOG = logging.getLogger(__name__)

Strictness = bool | Literal["exact"]
"""True: every name of the model comes from the checkpoint, and what the checkpoint has beyond is reported. ``"exact"``:
that is refused as well. False: what is missing is initialised as the model does, and reported."""

STRICTNESSES = (True, False, "exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Say which names did not meet, and how to speak of them. Immutable."""

    missing: Sequence[str]
    """Names of the model that the checkpoint has not."""
    unexpected: Sequence[str]
    """Names of the checkpoint that the model has no place for."""
    owner: str
    """The class of the model."""
    checkpoint: str
    """The checkpoint, for a message."""
    file_of: Callable[[str], str]
    """The file that holds a name of the checkpoint, for a message."""
    missing_way_out: str
    unexpected_way_out: str
    alike: Sequence[str] = ()
    """Names of the model that are like the first unexpected one."""


def hold(names: Names, strict: Strictness) -> None:
    """Refuse what is missing or left over as ``strict`` says, and log in one line each what it lets pass.

    Raises:
        MissingTensorError: names are missing, unless ``strict`` is False.
        CheckpointError: names are left over, and ``strict`` is ``"exact"``.
    """
    if names.missing:
        left_over = f"; left over are {name_list(names.unexpected, 3)}" if names.unexpected else ""
        message = refusal(
            names.checkpoint,
            found=f"no tensor for {name_list(names.missing)}{left_over}",
            expected=f"every parameter and persistent buffer of {names.owner}",
            way_out=names.missing_way_out,
        )
        if strict:
            raise MissingTensorError(message)
        _LOG.warning(message)
    if names.unexpected and strict == "exact":
        such_as = f", such as {name_list(names.alike)}" if names.alike else ""
        raise CheckpointError(
            refusal(
                names.file_of(names.unexpected[0]),
                found=f"names that the model has no place for: {name_list(names.unexpected)}",
                expected=f"names of {names.owner}{such_as}",
                way_out=names.unexpected_way_out,
            )
        )
    if names.unexpected:
        _LOG.warning(
            "%s: %d tensors beyond those of %s are left out: %s",
            names.checkpoint,
            len(names.unexpected),
            names.owner,
            name_list(folded(names.unexpected)),
        )
