"""Read the arguments that loading, planning and offloading share, once, at the door."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any

import torch

from lading.checkpoint.completeness import STRICTNESSES, Strictness
from lading.checkpoint.locate import Source
from lading.errors import CheckpointError, PlanError, name_list, refusal
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


def strictness(strict: Any) -> Strictness:
    """Read how strictly names are held against each other.

    Raises:
        TypeError: it is none of the three ways.
    """
    if not any(strict is each for each in (True, False)) and strict != "exact":
        known = ", ".join(map(repr, STRICTNESSES))
        raise TypeError(refusal("strict", found=repr(strict), expected=f"one of {known}", way_out="leave it out: True"))
    given: Strictness = strict
    return given


@contextmanager
def plain_torch(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Keep inference mode, a default device and, if ``dtype`` is given, a default dtype out of what is loaded inside.

    Raises:
        CheckpointError: the default device is meta, on which no weight is real.
    """
    device = torch.get_default_device()
    if device.type == "meta":
        raise CheckpointError(
            refusal(
                "loading inside torch.device('meta')",
                found="a default device on which tensors have no data",
                expected="weights that are real",
                way_out="load outside of it; lading.empty() builds a module without memory for its weights",
            )
        )
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype not in (None, before):
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(dtype)
        yield


def one_device(device_map: Any) -> dict[str, Any] | None:
    """Name the one device that a device map gives to the whole model; None for the CPU, or where there are several.

    Raises:
        PlanError: that device is not here, no place for weights, or nothing that names a device.
    """
    listed = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    odd = [each for each in listed if not isinstance(each, (str, int, torch.device, NoneType))]
    if odd:
        expected = "devices such as 0, 'cuda:0', 'cpu' and 'disk', or a map of module names to such"
        found = f"a {type(odd[0]).__name__}"
        raise PlanError(refusal("device_map", found=found, expected=expected, way_out='pass "cpu", or leave it out'))
    devices = set(listed)
    if len(devices) != 1:
        return None
    (device,) = devices
    if device in (None, "cpu", "disk", *BY_PLAN) or str(device) == "cpu":
        return None
    reason = "a device on which no weight is real" if str(device) == "meta" else why_not_here(device)
    if reason is not None:
        expected = f"a device that is here, a map of module names to such, or one of {name_list(BY_PLAN)}"
        way_out = 'pass device_map="cpu", or "auto" with max_memory'
        raise PlanError(refusal(f"device_map={device_map!r}", found=reason, expected=expected, way_out=way_out))
    return {"": device}


def why_not_here(device: Any) -> str | None:
    """Say in torch's words why no tensor can be made on a device; None: one can."""
    try:
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
        TypeError,
        ValueError,
    ) as error:  # an assertion where torch has no such device
        return str(error).split(". ")[0].splitlines()[0]
    return None


BY_PLAN = {"auto": "contiguous", "balanced": "balanced", "balanced_low_0": "balanced", "sequential": "sequential"}
"""What ``from_pretrained`` calls the ways of choosing devices, and what `lading.plan` does."""
