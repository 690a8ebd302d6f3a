"""Capture tensors inside a model: the public door of `recording`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lading.api.arguments import why_not_here
from lading.errors import CaptureError, refusal
from lading.recording.capture import Capture
from lading.recording.groups import Group
from lading.recording.opening import open_capture
from lading.recording.selection import Selection, Sink, Tokens

DECLARED = ("hidden_states", "attentions", "cross_attentions", "router_logits")


def capture(  # noqa: PLR0913 - each says one thing about what is kept
    model: nn.Module,
    sites: str | type[nn.Module] | Iterable[str | type[nn.Module]],
    *,
    tokens: Tokens = None,
    mask: torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    to: str | torch.device | Sink | None = None,
    view: bool = False,
    detach: bool = True,
    stop_after: str | None = None,
) -> Capture:
    """Keep what chosen modules take or give while a block of code runs, for the calling context alone.

    Args:
        model: not compiled; offloaded models and ``generate`` are fine.
        sites: module names, patterns, classes: ``"model.layers.*"``, ``"model.layers.{0,6,-1}.self_attn"``,
            ``"model.layers.3:input"``, ``"model.layers.3.self_attn:output[1]"``, or a class of modules. Of a module
            that gives several tensors the first is kept, unless an element is named in brackets. For transformers
            models also ``"hidden_states"``, ``"attentions"``, ``"cross_attentions"`` or ``"router_logits"``, as the
            architecture declares them: ``seen.hidden_states`` is the tuple that it would return. Its first entry is the
            first layer's input (embeddings, behind a norm of theirs), its last one the model's output where the
            architecture says so, behind the final norm; ``"hidden_states:prenorm"`` ends with what the last layer
            gave, ``"hidden_states:postnorm"`` with the model's output, whatever it says. With several models inside,
            such as encoder and decoder, each is ``seen.group("encoder.hidden_states")``.
        tokens: what is kept of tensors [rows, tokens, …]: ``"last"`` [rows, …], ``"mean"`` [rows, …], ``"mask"``
            [unmasked tokens, …], or positions [rows, positions, …]. None: everything.
        mask: [rows, tokens], for ``tokens``; None: the ``attention_mask`` of the innermost call around the site that
            was given one of rows and tokens, or all tokens.
        reduce: what is made of that; a function of one tensor.
        dtype: what that is cast to.
        to: the device on which it is kept (from an accelerator to ``"cpu"`` without waiting; ``"gpu"``: the current
            accelerator), or a function of name and tensor that takes it instead.
        view: keep the model's own tensors instead of copies of their own bytes.
        detach: False keeps the graph, so that gradients flow through what was captured.
        stop_after: a site after which the rest of the forward is not run. It ends the block of code; use
            `Capture.until_stop` for several calls.

    Returns:
        A context manager whose value is itself: ``seen[name]`` is the tensor of the only call, ``seen.calls(name)``
        lists those of all calls. Nobody else's forwards are kept, whichever thread runs them; ``seen.bind(function)``
        lets a function be heard wherever it runs.

    Raises:
        CaptureError: a site that stands for nothing, a compiled model, a tensor that is not there, a mask of other
            tokens; and, instead of a part, where another thread ran layers for a captured forward, or compiled code.

    Any thread; the model may be called from many meanwhile.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with lading.capture(net, ["0", "1:input"]) as seen:
        ...     _ = net(torch.ones(3, 4))
        >>> seen["0"].shape, torch.equal(seen["0"], seen["1:input"])
        (torch.Size([3, 8]), True)
    """
    selection = Selection(
        tokens=tokens, mask=mask, reduce=reduce, dtype=dtype, to=_destination(to), view=view, detach=detach
    )
    asked = [sites] if isinstance(sites, (str, type)) else list(sites)
    plain: list[str | type[nn.Module]] = []
    groups: list[Group] = []
    for each in asked:
        name, _, end = each.partition(":") if isinstance(each, str) else ("", "", "")
        if name in DECLARED and name not in dict(model.named_children()):
            from lading.adapters.transformers_sites import declared_groups

            groups += declared_groups(model, name, end)
        else:
            plain.append(each)
    return open_capture(model, plain, selection, stop_after, tuple(groups))


def _destination(to: str | torch.device | Sink | None) -> torch.device | Sink | None:
    if to is None or callable(to):
        return to
    if to == "gpu":
        if not torch.accelerator.is_available():
            raise CaptureError(
                refusal("to='gpu'", found="no accelerator", expected="one", way_out="leave it out: kept where it is")
            )
        return torch.accelerator.current_accelerator()
    reason = why_not_here(to)
    if reason is not None:
        expected = "a device that is here, or a function of name and tensor"
        raise CaptureError(refusal(f"to={to!r}", found=reason, expected=expected, way_out='such as "cpu"'))
    return torch.device(to)
