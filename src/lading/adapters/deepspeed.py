"""Notice DeepSpeed's ZeRO-3, without importing it: who uses it has imported it already."""

from __future__ import annotations

import sys

from lading.errors import CheckpointError, refusal


def refuse_zero_init() -> None:
    """Refuse to load while modules are partitioned as they are built.

    Under ``deepspeed.zero.Init``, entered directly or by transformers for a live ``HfDeepSpeedConfig`` of stage 3, each
    rank keeps a slice of each parameter. A full tensor cannot be bound to one; the model would run on random slices.

    Raises:
        CheckpointError: in either case.
    """
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    integration = sys.modules.get("transformers.integrations.deepspeed")
    found = None
    if partitioning is not None and vars(partitioning).get("zero_init_context"):
        found = "an active deepspeed.zero.Init, which slices every parameter over the ranks"
    elif integration is not None and integration.is_deepspeed_zero3_enabled():
        found = "a live HfDeepSpeedConfig of ZeRO stage 3, which slices every parameter over the ranks"
    if found is not None:
        raise CheckpointError(
            refusal(
                "lading.load",
                found=found,
                expected="whole parameters, because rank-local loading does not exist yet",
                way_out="load outside of it",
            )
        )
