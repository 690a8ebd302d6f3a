"""Load, place and run PyTorch models that do not fit, and get their insides out, without changing the model.

This file is the door: it lists the public names and runs nothing. Each name is imported when it is first used, so that
``import lading`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lading.api.capturing import capture as capture
    from lading.api.convoying import convoy as convoy
    from lading.api.embedding import Embedder as Embedder
    from lading.api.loading import load as load
    from lading.api.loading import load_into as load_into
    from lading.api.offloading import offload as offload
    from lading.api.planning import plan as plan
    from lading.checkpoint.empty import empty as empty
    from lading.checkpoint.report import LoadReport as LoadReport
    from lading.embed.store import VectorStore as VectorStore
    from lading.errors import CaptureError as CaptureError
    from lading.errors import CheckpointError as CheckpointError
    from lading.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from lading.errors import CorruptShardError as CorruptShardError
    from lading.errors import EmbedError as EmbedError
    from lading.errors import LadingError as LadingError
    from lading.errors import MissingExtraError as MissingExtraError
    from lading.errors import MissingTensorError as MissingTensorError
    from lading.errors import PlanError as PlanError
    from lading.errors import ResidencyError as ResidencyError
    from lading.errors import ShapeMismatchError as ShapeMismatchError
    from lading.errors import StoreError as StoreError
    from lading.placement.hardware import Bandwidths as Bandwidths
    from lading.placement.plan import Plan as Plan
    from lading.placement.plan import PlanWarning as PlanWarning
    from lading.placement.workload import Workload as Workload
    from lading.residency.convoy import Convoy as Convoy
    from lading.residency.residency import Residency as Residency
    from lading.residency.stats import ResidencyStats as ResidencyStats
    from lading.residency.width import ConvoyStats as ConvoyStats

_HOMES = {
    "load": "api.loading",
    "load_into": "api.loading",
    "empty": "checkpoint.empty",
    "capture": "api.capturing",
    "convoy": "api.convoying",
    "plan": "api.planning",
    "offload": "api.offloading",
    "Convoy": "residency.convoy",
    "ConvoyStats": "residency.width",
    "Residency": "residency.residency",
    "ResidencyStats": "residency.stats",
    "Plan": "placement.plan",
    "PlanWarning": "placement.plan",
    "Workload": "placement.workload",
    "Bandwidths": "placement.hardware",
    "Embedder": "api.embedding",
    "VectorStore": "embed.store",
    "LoadReport": "checkpoint.report",
    "LadingError": "errors",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "MissingTensorError": "errors",
    "ShapeMismatchError": "errors",
    "CorruptShardError": "errors",
    "PlanError": "errors",
    "ResidencyError": "errors",
    "EmbedError": "errors",
    "CaptureError": "errors",
    "StoreError": "errors",
    "MissingExtraError": "errors",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - the names are the table's keys
__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lading' has no attribute {name!r}")
    value = getattr(import_module(f"lading.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
