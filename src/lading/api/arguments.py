"""Read the arguments that loading, planning and offloading share, once, at the door."""

from __future__ import annotations

import os
from typing import Any

import torch

from lading.checkpoint.locate import Source
from lading.errors import refusal
from lading.units import parse_dtype

PathOrRepoId = str | os.PathLike[str]


def source_of(path_or_repo_id: PathOrRepoId, *, cache_dir: PathOrRepoId | None = None, **options: Any) -> Source:
    """Say where a checkpoint is sought; paths of any kind become text."""
    cache = None if cache_dir is None else os.fspath(cache_dir)
    return Source(path_or_repo_id=os.fspath(path_or_repo_id), cache_dir=cache, **options)


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """Find the element type that a text names; ``"auto"`` stays.

    Raises:
        TypeError: no element type has this name.
    """
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    try:
        return parse_dtype(dtype)
    except ValueError as error:
        raise TypeError(
            refusal("dtype", found=repr(dtype), expected="'auto', a torch.dtype or its name", way_out="see torch.dtype")
        ) from error


def one_dtype(dtype: Any, torch_dtype: torch.dtype | str | None) -> Any:
    """Settle the two names of one argument."""
    if torch_dtype is None:
        return named_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype not in ("auto", torch_dtype):
        raise TypeError(
            refusal(
                "lading.load",
                found=f"dtype={dtype!r} and torch_dtype={torch_dtype!r}",
                expected="one of them",
                way_out="pass dtype",
            )
        )
    return named_dtype(torch_dtype)


def one_device(device_map: Any) -> dict[str, Any] | None:
    """Name the one device that a device map gives to the whole model; None for the CPU, or where there are several."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1:
        return None
    (device,) = devices
    if device in (None, "cpu", "disk", *BY_PLAN) or str(device) == "cpu":
        return None
    return {"": device}


BY_PLAN = {"auto": "contiguous", "balanced": "balanced", "balanced_low_0": "balanced", "sequential": "sequential"}
"""What ``from_pretrained`` calls the ways of choosing devices, and what `lading.plan` does."""
