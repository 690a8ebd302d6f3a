"""Change pooled vectors as the modules do that sentence-transformers puts behind its pooling.

Each class is an immutable function [rows, in] → [rows, out] over tensors it is given; knows no file. Weights follow the
vectors' device and dtype at each call: they are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Normalize:
    """Scale every vector to length 1; a zero vector stays zero.

    >>> import torch
    >>> Normalize()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def __call__(self, vectors: Tensor) -> Tensor:
        """Give the scaled vectors."""
        return functional.normalize(vectors, p=2, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """Apply a linear layer and an activation, and add the input again where the model says so."""

    weight: Tensor
    """[out, in]"""
    bias: Tensor | None
    """[out]; None: no bias."""
    activation: Callable[[Tensor], Tensor]
    adds_input: bool = False
    """Whether the input is added to the result."""
    residual: Tensor | None = None
    """[out, in], applied to the input before it is added; None: added as it is."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Give the projected vectors."""
        bias = None if self.bias is None else self.bias.to(vectors)
        projected = self.activation(functional.linear(vectors, self.weight.to(vectors), bias))
        if not self.adds_input:
            return projected
        return projected + (vectors if self.residual is None else functional.linear(vectors, self.residual.to(vectors)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerNorm:
    """Normalise every vector over its dimensions, then scale and shift it."""

    weight: Tensor
    """[width]"""
    bias: Tensor
    """[width]"""
    eps: float = 1e-5

    def __call__(self, vectors: Tensor) -> Tensor:
        """Give the normalised vectors."""
        weight, bias = self.weight.to(vectors), self.bias.to(vectors)
        return functional.layer_norm(vectors, weight.shape, weight, bias, self.eps)


def apply_head(head: tuple[Callable[[Tensor], Tensor], ...], vectors: Tensor, truncate_dim: int | None) -> Tensor:
    """Send pooled vectors through every layer of ``head`` in order, then keep the first ``truncate_dim`` dimensions.

    >>> import torch
    >>> apply_head((Normalize(),), torch.tensor([[3.0, 4.0]]), truncate_dim=1)
    tensor([[0.6000]])
    """
    for layer in head:
        vectors = layer(vectors)
    return vectors if truncate_dim is None else vectors[:, :truncate_dim]
