"""Let batches cross a model together: the public door of the convoy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lading.errors import ResidencyError, refusal
from lading.residency.convoy import Convoy
from lading.residency.crew import Crossings
from lading.residency.residency import convoy_of

_SEEDS = 1 << 62


def convoy(  # noqa: PLR0913 - each says one thing about how batches cross
    model: nn.Module | Callable[..., Any],
    batches: Iterable[Any],
    *,
    width: int | str = "auto",
    function: Callable[[Any], Any] | None = None,
    seed: int | None = None,
    on_error: str = "raise",
    patience_s: float = 60.0,
    **constants: Any,
) -> Convoy:
    """Run many batches through an offloaded model together, each streamed block fetched once for all of them.

    Micro-batches advance block by block: one runs at a time, each in a thread of its own through the unmodified model,
    and gives its output bit for bit as if it were called alone. A model of which nothing streams is called batch by
    batch. As with any number of threads in one model, batches mix where modules keep one call's state on themselves
    between their forwards, as recurrent_gemma of transformers 4 does.

    Args:
        model: offloaded by `lading.load` or `lading.offload`; or a method of it, such as ``model.generate``, with which
            sequences decode together, each step fetching the weights once for all. Not with static caches, which
            belong to the model.
        batches: mappings (keyword arguments), tuples (positional ones) or tensors; taken only as far as a crossing
            needs. What it raises comes after the outputs of the batches before.
        width: micro-batches a crossing, at least 1. ``"auto"``: as many as hide fetching behind computing, from how
            long the first block takes and how fast blocks come in, within the memory for activations: what the plan
            keeps for its workload, else half of what is free.
        function: called with each batch, as it is, in place of ``model``, which it may call any number of times. Nobody
            looks whether its calls keep state on the model, as ``generate`` with a static cache may.
        seed: batch number i runs as after ``torch.manual_seed(seed + i)``; None draws one from torch's generator.
            Random states of Python and NumPy are shared; torch's generator is the process's, so other threads that
            draw meanwhile, such as another convoy, change what is drawn.
        on_error: ``"raise"`` an exception of a batch when its output is due, after which iterating may go on;
            ``"return"`` the exception as its output. The other batches go on in either case.
        patience_s: how long model code may stand still, using no processor, before it counts as waiting for another
            batch for ever, as at a barrier or for a lock that is kept across blocks.
        **constants: further keyword arguments of every call.

    Returns:
        An iterator of outputs in the order of the batches, each with the grad and inference mode, autocast, default
        device, accelerator stream and context variables (captures, too) of where it is iterated. A context manager;
        ``stats()`` says what bound it. While it is under way, the model counts as being inside a forward.

    Raises:
        ResidencyError: a static cache; micro-batches that wait for each other; parts of the model that were offloaded
            separately; or an argument out of range.

    Iterate in one thread; any other may call the model meanwhile.

    Example:
        >>> import lading, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [torch.full((1, 4), float(number)) for number in range(3)]
        >>> with lading.offload(net, {"": "disk"}):
        ...     outputs = list(lading.convoy(net, batches, width=2))
        >>> [torch.equal(output, net(batch)) for output, batch in zip(outputs, batches)]
        [True, True, True]
    """
    _check(width, function, seed, on_error, patience_s)
    module = getattr(model, "__self__", model)
    if not isinstance(module, nn.Module):
        raise ResidencyError(
            refusal(
                "lading.convoy",
                found=f"{type(model).__name__}",
                expected="a module, or a method of one",
                way_out="give the module, and what is to be called as function=",
            )
        )
    is_generative = hasattr(module, "generation_config")
    if is_generative:
        from lading.adapters.generation import refuse_static_cache

        refuse_static_cache(module if model is not module else None, constants)
    base = int(torch.randint(_SEEDS, (), device="cpu")) if seed is None else seed

    def call(batch: Any) -> Any:
        named = _named(batch)
        if is_generative:
            refuse_static_cache(None, named, is_for_all=False)
        return model(*_positional(batch), **named, **constants)

    crossings = Crossings(
        call=call if function is None else partial(function, **constants),
        seeds=lambda index: base + index,
        patience_s=patience_s,
    )
    given = None if isinstance(width, str) else width
    is_one_call = function is None and model is module
    return convoy_of(module, batches, crossings, given, is_one_call=is_one_call, returns_errors=on_error == "return")


def _check(width: Any, function: Any, seed: Any, on_error: Any, patience_s: Any) -> None:
    checks = (
        ("width", width, width == "auto" or (type(width) is int and width >= 1), 'a number of at least 1, or "auto"'),
        ("function", function, function is None or callable(function), "a function of a batch"),
        ("seed", seed, seed is None or (type(seed) is int and -(1 << 63) <= seed < 1 << 64), "a number of 64 bits"),
        ("on_error", on_error, on_error in ("raise", "return"), '"raise" or "return"'),
        ("patience_s", patience_s, isinstance(patience_s, (int, float)) and patience_s > 0, "a positive number"),
    )
    for name, value, is_right, expected in checks:
        if not is_right:
            found = f"{name}={value!r}"
            raise ResidencyError(refusal("lading.convoy", found=found, expected=expected, way_out="give one"))


def _positional(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, Mapping):
        return ()
    if isinstance(batch, tuple):
        return batch
    if isinstance(batch, torch.Tensor):
        return (batch,)
    raise ResidencyError(
        refusal(
            "a batch",
            found=f"{type(batch).__qualname__}",
            expected="a mapping of arguments, a tuple of them, or a tensor",
            way_out="give function=, which is called with whatever batches are",
        )
    )


def _named(batch: Any) -> dict[str, Any]:
    return dict(batch) if isinstance(batch, Mapping) else {}
