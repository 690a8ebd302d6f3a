"""Name the element types a checkpoint may hold: their width, their kind and their torch name.

The names are those of the safetensors format (https://github.com/huggingface/safetensors, "Format"). Imports no torch:
`torch_dtype` looks the type up when it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lading.errors import CheckpointError, refusal

if TYPE_CHECKING:
    import torch

Kind = Literal["float", "small float", "integer", "bool", "complex"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementType:
    """Describe one element type. Immutable."""

    name: str
    """The format's name, for example ``BF16``."""
    bits: int
    """Width of one element in bits; below 8 several share a byte."""
    kind: Kind
    """What may stand in for it: floats may be cast to floats, everything else must match exactly."""
    torch_name: str | None
    """The attribute of ``torch``; None where torch has no type for it."""

    @property
    def alignment_bytes(self) -> int:
        """Give the alignment that torch's kernels expect of the first element, in bytes."""
        return max(1, self.bits // 8)


def _table() -> dict[str, ElementType]:
    rows: list[tuple[str, int, Kind, str | None]] = [
        ("BOOL", 8, "bool", "bool"),
        ("F4", 4, "small float", "float4_e2m1fn_x2"),
        ("F6_E2M3", 6, "small float", None),
        ("F6_E3M2", 6, "small float", None),
        ("F8_E5M2", 8, "small float", "float8_e5m2"),
        ("F8_E4M3", 8, "small float", "float8_e4m3fn"),
        ("F8_E8M0", 8, "small float", "float8_e8m0fnu"),
        ("F8_E5M2FNUZ", 8, "small float", "float8_e5m2fnuz"),
        ("F8_E4M3FNUZ", 8, "small float", "float8_e4m3fnuz"),
        ("U8", 8, "integer", "uint8"),
        ("I8", 8, "integer", "int8"),
        ("U16", 16, "integer", "uint16"),
        ("I16", 16, "integer", "int16"),
        ("F16", 16, "float", "float16"),
        ("BF16", 16, "float", "bfloat16"),
        ("U32", 32, "integer", "uint32"),
        ("I32", 32, "integer", "int32"),
        ("F32", 32, "float", "float32"),
        ("U64", 64, "integer", "uint64"),
        ("I64", 64, "integer", "int64"),
        ("F64", 64, "float", "float64"),
        ("C64", 64, "complex", "complex64"),
        ("C128", 128, "complex", "complex128"),
    ]
    return {name: ElementType(name=name, bits=bits, kind=kind, torch_name=torch) for name, bits, kind, torch in rows}


ELEMENT_TYPES = _table()
"""Every known element type by its format name."""


def torch_dtype(element: ElementType) -> torch.dtype:
    """Give torch's dtype for an element type.

    Raises:
        CheckpointError: no torch has it, or the installed one is too old.
    """
    import torch

    if element.torch_name is None:
        raise CheckpointError(
            refusal(
                f"element type {element.name}",
                found=f"no type of {element.bits} bits in torch",
                expected="a type that torch has",
                way_out="leave the tensor out (load_into(rename=…) gives None for its name), or have the tool that "
                "wrote it dequantise it",
            )
        )
    dtype = getattr(torch, element.torch_name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            refusal(
                f"element type {element.name}",
                found=f"no torch.{element.torch_name} in torch {torch.__version__}",
                expected="a torch that knows it",
                way_out="install a newer torch",
            )
        )
    return dtype


def element_type(dtype: torch.dtype) -> ElementType | None:
    """Give the element type of a torch dtype; None when checkpoints cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    return next((element for element in ELEMENT_TYPES.values() if element.torch_name == name), None)


def is_plain_float(dtype: torch.dtype) -> bool:
    """Say whether a dtype is a float of 16 bits or more, which may be cast to another such."""
    element = element_type(dtype)
    return element is not None and element.kind == "float"


def require_compatible(found: torch.dtype, expected: torch.dtype, subject: str) -> None:
    """Refuse data whose element type cannot stand for the expected one without guessing.

    Floats of 16 bits and more may be cast to each other. Integers, booleans, complex numbers and floats of 8 bits and
    fewer, whose scale stands elsewhere, must match exactly.

    Raises:
        CheckpointError: naming ``subject``, found and expected.
    """
    if found != expected and not (is_plain_float(found) and is_plain_float(expected)):
        raise CheckpointError(
            refusal(
                subject,
                found=f"{str(found).removeprefix('torch.')} data",
                expected=str(expected).removeprefix("torch."),
                way_out="load a checkpoint of this element type, or dequantise it with the tool that wrote it",
            )
        )
