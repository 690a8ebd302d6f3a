"""Say what a load did. A record and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Tell which tensors a load bound, copied, missed and left over. Immutable.

    Example:
        >>> LoadReport(num_tensors=3, mapped_bytes=12, copied_bytes=0).missing
        ()
    """

    num_tensors: int
    """Tensors of the checkpoint that the module took."""
    mapped_bytes: int
    """Bytes of the model that are views of the file, tied ones once."""
    copied_bytes: int
    """Bytes of the model that are memory of its own: cast, misaligned, fused, initialised or asked for."""
    missing: tuple[str, ...] = ()
    """Names of the module without a tensor, initialised as the module does (``strict=False`` only)."""
    unexpected: tuple[str, ...] = ()
    """Names of the checkpoint that the module has no place for."""
    mismatched: tuple[str, ...] = ()
    """Names of the module whose tensors have other shapes, initialised as it does (``ignore_mismatched_sizes``)."""
    adapter: str = ""
    """The folder or repository of the adapter that was attached; empty: none."""
    loader: str = "lading"
    """Who put the weights in place: ``"lading"`` or ``"transformers"``, whose own path converts and casts."""
