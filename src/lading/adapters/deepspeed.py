"""Notice DeepSpeed's ZeRO-3, without importing it: who uses it has imported it already."""

from __future__ import annotations

import sys

from lading.errors import CheckpointError


def refuse_zero_init() -> None:
    """Refuse to load while modules are being partitioned as they are built.

    Under ``deepspeed.zero.Init`` each rank keeps a slice of each parameter, so a full tensor cannot be bound; bound
    anyway, the model would run on random slices.

    Raises:
        CheckpointError: inside a ``deepspeed.zero.Init`` context.
    """
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is not None and vars(partitioning).get("zero_init_context"):
        raise CheckpointError(
            "lading.load: found an active deepspeed.zero.Init, which slices every parameter over the ranks · "
            "expected whole parameters, because rank-local loading does not exist yet · load outside of the context"
        )
