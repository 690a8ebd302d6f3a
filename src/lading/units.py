"""Read and write sizes, and names of element types. GiB = 2**30 bytes. Knows no other file of the package."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for a person, with binary units.

    >>> format_bytes(512), format_bytes(3 * 2**30)
    ('512 B', '3.0 GiB')
    """
    size = float(num_bytes)
    for unit in _BINARY:
        if abs(size) < 1024 or unit == _BINARY[-1]:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | float | str) -> int:
    """Read a number of bytes: an integer, or a text such as ``"10GiB"`` (2**30) or ``"10GB"`` (10**9), in any case.

    Raises:
        ValueError: it is no size, or it is negative.

    >>> parse_bytes("1.5 GiB"), parse_bytes("2gb"), parse_bytes(7)
    (1610612736, 2000000000, 7)
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        factor = _UNITS.get(match[2].upper().replace("IB", "iB")) if match else None
        if match is None or factor is None:
            raise ValueError(f"{size!r} is no size such as '10GiB', '500MB' or '4096'")
        whole, _, fraction = match[1].partition(".")
        return int(whole or 0) * factor + int(fraction or 0) * factor // int(10 ** len(fraction))
    if isinstance(size, bool) or not hasattr(size, "__int__") or not 0 <= float(size) < float("inf"):
        raise ValueError(f"{size!r} is no number of bytes")
    return int(size)


def parse_dtype(dtype: Any) -> torch.dtype:
    """Read an element type: a ``torch.dtype``, or its name with or without ``torch.``.

    Raises:
        ValueError: it is no element type and no name of one.

    >>> parse_dtype("bfloat16"), parse_dtype("torch.int8")
    (torch.bfloat16, torch.int8)
    """
    import torch

    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype!r} is no torch.dtype and no name of one, such as 'bfloat16'")  # noqa: TRY004 - most often a name
    return found
