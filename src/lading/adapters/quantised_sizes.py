"""Tell what quantised weights weigh, with the scales and tables beside them, before there are any.

Knows transformers' quantizers and bitsandbytes' layout; a quantised checkpoint's headers speak for every other library.
Guarantees: never less than the loaded model holds, or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lading.checkpoint.catalog import Catalog
from lading.errors import LadingError, PlanError, name_list, refusal


def tensors_of_model(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield every parameter and buffer under each of its names, and whether checkpoints hold it."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor, name not in module._non_persistent_buffers_set


def is_castable(tensor: torch.Tensor) -> bool:
    """Say whether loading may cast a tensor: a float of 16 bits or more."""
    return tensor.is_floating_point() and tensor.itemsize > 1


@contextmanager
def refusing_quantizers(subject: str, is_quantised: bool) -> Iterator[None]:
    """Turn what a quantizer raises where it cannot work into a refusal.

    Raises:
        PlanError: in place of whatever was raised, if ``is_quantised``.
    """
    try:
        yield
    except (ImportError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, LadingError) or not is_quantised:
            raise
        raise PlanError(
            refusal(
                subject or "the quantised model",
                found=f"a quantizer that cannot be set up here ({error})",
                expected="one of transformers' that works on this machine",
                way_out="install what it asks for, or plan where the model will be loaded",
            )
        ) from error


def is_bitsandbytes(quantizer: Any) -> bool:
    """Say whether a quantizer, None for none, is bitsandbytes, whose sizes can be told without headers."""
    return quantizer is not None and bool(quantizer.quantization_config.quant_method == "bitsandbytes")


def refuse_growing(quantizer: Any, subject: str) -> None:
    """Refuse to place what grows: compressed-tensors unpacks its weights in the model's first forward.

    Args:
        quantizer: transformers' own, or None.
        subject: the model, for the message.

    Raises:
        PlanError: it will, so that no number of bytes holds before and after.
    """
    settings = getattr(quantizer, "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    if getattr(method, "value", method) == "compressed-tensors" and not getattr(settings, "dequantize", False):
        raise PlanError(
            refusal(
                subject,
                found="a compressed-tensors checkpoint, which is decompressed in the first forward",
                expected="weights of a fixed size",
                way_out="load it whole, or save it decompressed first (transformers: dequantize=True)",
            )
        )


def quantised_bytes(model: nn.Module, quantizer: Any, find_catalog: Callable[[], Catalog | None]) -> dict[str, int]:
    """Give the bytes of each quantised weight by name: from the headers, else as bitsandbytes will make them.

    Args:
        model: with its layers replaced by the quantizer, and nothing in them.
        quantizer: transformers' own.
        find_catalog: gives the checkpoint, None where it is not on this machine.

    Raises:
        PlanError: neither can be told.
    """
    refuse_growing(quantizer, type(model).__name__)
    if getattr(quantizer.quantization_config, "dequantize", False):
        return {}
    catalog = find_catalog() if quantizer.pre_quantized else None
    if catalog is not None:
        return _stored_bytes(model, catalog)
    if not is_bitsandbytes(quantizer):
        raise PlanError(
            refusal(
                type(model).__name__,
                found=f"{quantizer.quantization_config.quant_method} without a quantised checkpoint on this machine",
                expected="a checkpoint whose headers tell the sizes, or bitsandbytes",
                way_out="download or write the quantised checkpoint first",
            )
        )
    weights = [(name, tensor) for name, tensor, _ in tensors_of_model(model)]
    sizes = {name: _made_bytes(weight) for name, weight in weights if quantizer.param_needs_quantization(model, name)}
    layers = [name for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes.")]
    if layers and not sizes:
        raise PlanError(
            refusal(
                type(model).__name__,
                found=f"layers of bitsandbytes, none of whose weights {type(quantizer).__name__} quantises: "
                f"{name_list(layers)}",
                expected="a quantised weight in each",
                way_out="load the model and plan the module",
            )
        )
    return sizes


def _made_bytes(weight: Any) -> int:
    """Count what bitsandbytes 0.50 makes of a weight: rows of int8 with a scale, or halves of bytes with scales."""
    size: int = weight.numel()
    if not hasattr(weight, "blocksize"):
        return size * weight.itemsize if weight.has_fp16_weights else size + 4 * len(weight)
    num_scales: int = -(-size // weight.blocksize)
    scales = 4 * num_scales
    if weight.compress_statistics:  # a byte each, with a mean, and 256 of them share a scale and a table
        scales = num_scales + 4 + 4 * -(-num_scales // 256) + 4 * 256
    width: int = weight.quant_storage.itemsize
    return -(-size // 2 // width) * width + scales + 4 * 16


def _stored_bytes(model: nn.Module, catalog: Catalog) -> dict[str, int]:
    """Add up, weight by weight, what a quantised checkpoint holds; other floats may be cast, so the model tells."""
    held = {name: tensor for name, tensor, is_stored in tensors_of_model(model) if is_stored}
    own = {spec.name: spec for spec in catalog if spec.name in held}
    states: Counter[str] = Counter()
    astray: dict[str, int] = {}
    for spec in catalog:
        if spec.name not in own:
            owner = _owner(spec.name, held)
            if owner is not None:
                states[owner] += spec.num_bytes
            elif spec.element.kind != "float":
                astray[spec.name] = spec.num_bytes
    quantised = {name for name, spec in own.items() if spec.element.kind != "float" or not is_castable(held[name])}
    sizes = {name: states[name] + (own[name].num_bytes if name in own else 0) for name in quantised | states.keys()}
    lacking = sum(tensor.nbytes for name, tensor in held.items() if name not in sizes and not is_castable(tensor))
    if astray and sum(astray.values()) != lacking:  # else they are joined on loading, and the model tells
        raise PlanError(
            refusal(
                catalog.describe(),
                found=f"quantised tensors that transformers renames or rebuilds: {name_list(astray)}",
                expected=f"the names of {type(model).__name__}",
                way_out="load the model and plan the module",
            )
        )
    return sizes


def _owner(name: str, held: Mapping[str, torch.Tensor]) -> str | None:
    """Find the tensor whose quantisation state a stored one is: of ``x.SCB`` and ``x.weight.absmax`` it is x.weight."""
    path = name
    while path := path.rpartition(".")[0]:
        if path in held:
            return path
        if f"{path}.weight" in held:
            return f"{path}.weight"
    return None
