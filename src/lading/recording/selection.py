"""Keep of a captured tensor what was asked for, at once, before anything accumulates.

Shape suffixes: B rows, T tokens, K chosen tokens, N unmasked tokens of all rows, D whatever follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lading.errors import CaptureError, refusal
from lading.recording.calls import Mask

Tokens = str | int | slice | Sequence[int] | torch.Tensor | None
Sink = Callable[[str, torch.Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Say what of each captured tensor is kept, and where. Immutable."""

    tokens: Tokens = None
    """None: all. ``"last"``: the last unmasked one of each row, [B, D]. ``"mean"``: their mean, [B, D], in the tensor's
    dtype, summed in float32 at least. ``"mask"``: all unmasked ones of all rows, [N, D]. Positions: [B, K, D]."""
    mask: torch.Tensor | None = None
    """[B, T], non-zero for tokens that count; None: the call's ``attention_mask``, and without one all count."""
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    dtype: torch.dtype | None = None
    to: str | torch.device | Sink | None = None
    """A device, or a function of name and tensor that takes it in place of us; None: it stays where it is."""
    view: bool = False
    """Keep the model's own tensor: no copy, all the bytes that it is a part of, and whatever is written to it later."""
    detach: bool = True

    def __post_init__(self) -> None:
        named = ("last", "mean", "mask")
        checks = (
            ("tokens", not isinstance(self.tokens, str) or self.tokens in named, f"one of {named}, or positions"),
            ("mask", self.mask is None or isinstance(self.mask, torch.Tensor), "a tensor of rows and tokens"),
            ("tokens", self.mask is None or isinstance(self.tokens, str), f"one of {named}, because of mask="),
            ("reduce", self.reduce is None or callable(self.reduce), "a function of one tensor"),
            ("dtype", self.dtype is None or isinstance(self.dtype, torch.dtype), "a torch.dtype"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                found = repr(getattr(self, name))
                raise CaptureError(refusal(name, found=found, expected=expected, way_out="give one"))
        if self.view and (self.dtype is not None or self.to is not None):
            raise CaptureError(
                refusal("view=True", found="dtype= or to=", expected="neither: both copy", way_out="leave view out")
            )

    @property
    def asks_mask(self) -> bool:
        """Whether it depends on the mask of the call."""
        return self.mask is None and isinstance(self.tokens, str)

    @property
    def is_whole(self) -> bool:
        """Whether tensors are kept as they are, where they are: what `keep_whole` does."""
        return all(each is None for each in (self.tokens, self.reduce, self.dtype, self.to))

    def keep_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep a tensor as it is, by the shortest way: what `choose` and `move` come to."""
        kept = tensor.detach() if self.detach and tensor.requires_grad else tensor
        if self.view:
            return kept
        if kept.is_contiguous():
            return kept.clone()  # a fifth less time than with the format named
        return kept.clone(memory_format=torch.contiguous_format)

    def choose(self, tensor: torch.Tensor, masks: Sequence[Mask], name: str) -> torch.Tensor:
        """Take the wanted tokens of what a module gave.

        Args:
            tensor: as the module gave it.
            masks: of the call that it was given in; none: all tokens count.
            name: of the site, for messages.

        Raises:
            CaptureError: it has no tokens, or a mask that leaves out some is not of these.
        """
        kept = tensor.detach() if self.detach else tensor
        return kept if self.tokens is None else self._choose(kept, masks, name)

    def move(self, kept: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Cast, move and copy what was chosen and reduced of a tensor.

        Returns:
            The kept tensor, in a storage of its own bytes unless ``view``; and an event that must be waited for before
            it is read, or None.
        """
        if self.dtype is not None:
            kept = kept.to(self.dtype)
        event = None
        if self.to is not None and not callable(self.to):
            kept, event = _moved(kept, torch.device(self.to))
        if not self.view and (_shares(kept, tensor) or kept.untyped_storage().nbytes() > kept.nbytes):
            kept = kept.clone(memory_format=torch.contiguous_format)
        return kept, event

    def _choose(self, kept_BTD: torch.Tensor, masks: Sequence[Mask], name: str) -> torch.Tensor:
        if kept_BTD.dim() < 2:
            raise CaptureError(
                refusal(
                    f"site {name!r}",
                    found=f"shape {tuple(kept_BTD.shape)}",
                    expected="rows and tokens, because of tokens=",
                    way_out="leave tokens out, or use reduce",
                )
            )
        if not isinstance(self.tokens, str):
            return _at(kept_BTD, self.tokens, name)
        given = masks if self.mask is None else [Mask(tensor=self.mask, num_given=frozenset(), is_sure=True)]
        mask_BT = _fitting(given, kept_BTD, name)
        if self.tokens == "mask":
            return kept_BTD[mask_BT]
        if self.tokens == "last":
            positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            last_B = (mask_BT * (positions_T + 1)).argmax(dim=1)
            return kept_BTD[torch.arange(len(kept_BTD), device=kept_BTD.device), last_B]
        weights = mask_BT.reshape(*mask_BT.shape, *[1] * (kept_BTD.dim() - 2))
        wide = torch.promote_types(kept_BTD.dtype, torch.float32)
        total_BD = kept_BTD.to(wide).masked_fill(~weights, 0).sum(dim=1)  # no product: padding may hold NaN
        return (total_BD / weights.sum(dim=1).clamp(min=1)).to(kept_BTD.dtype)


def _at(kept_BTD: torch.Tensor, tokens: Any, name: str) -> torch.Tensor:
    at = tokens if isinstance(tokens, (int, slice, torch.Tensor)) else torch.as_tensor(tokens, device="cpu")
    is_elsewhere = isinstance(at, torch.Tensor) and at.device.type != "cpu"
    try:
        if not is_elsewhere:
            torch.empty(kept_BTD.shape[1], device="cpu")[at]  # an accelerator fails later, and for good
    except IndexError as error:
        raise CaptureError(
            refusal(
                f"site {name!r}",
                found=f"shape {tuple(kept_BTD.shape)}",
                expected=f"rows and tokens, with the positions {tokens} among them",
                way_out="choose positions that each call has",
            )
        ) from error
    return kept_BTD[:, at.to(kept_BTD.device) if isinstance(at, torch.Tensor) else at]


def _fitting(masks: Sequence[Mask], kept_BTD: torch.Tensor, name: str) -> torch.Tensor:
    """Give the mask of these tokens: of their number, or longer where a cache holds the tokens before them."""
    num_rows, num_tokens = kept_BTD.shape[:2]
    for mask in masks:
        mask_BT = mask.tensor
        if mask_BT.shape[0] == num_rows and mask_BT.shape[1] > num_tokens and num_tokens in mask.num_given:
            mask_BT = mask_BT[:, -num_tokens:]
        if mask_BT.shape == (num_rows, num_tokens):
            return mask_BT.to(device=kept_BTD.device, dtype=torch.bool)
        if mask.is_sure or not mask_BT.all():
            raise CaptureError(
                refusal(
                    f"mask for site {name!r}",
                    found=f"shape {tuple(mask_BT.shape)}",
                    expected=f"[{num_rows}, {num_tokens}]",
                    way_out="pass a mask of the tokens that this site sees",
                )
            )
    return torch.ones(num_rows, num_tokens, dtype=torch.bool, device=kept_BTD.device)


def _moved(kept: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Copy to a device; from an accelerator to the host through pinned memory, without waiting for it."""
    if device.type != "cpu" or kept.device.type == "cpu" or kept.requires_grad:
        return kept.to(device), None
    host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
    host.copy_(kept, non_blocking=True)
    return host, torch.accelerator.current_stream(kept.device).record_event()


def _shares(kept: torch.Tensor, tensor: torch.Tensor) -> bool:
    return kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
