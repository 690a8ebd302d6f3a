"""Get every layer's output of one forward, in one of the ways there are, and build the models on which they compete.

Knows lading and its peers, each under the name of the call that a user would write; measures nothing. Runs in every
environment: what is not installed there is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

try:
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 4
    from transformers.utils.generic import check_model_inputs as capture_outputs

Call = Callable[[Any, Mapping[str, Any]], Any]
"""Runs a model on named inputs: who measures passes one with a clock in it."""


class Nothing(nn.Module):
    """Do nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return x


class Stack(nn.Module):
    """Do nothing, many times."""

    def __init__(self, num_layers: int, layer: Callable[[], nn.Module] = Nothing) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        for layer in self.layers:
            x = layer(x)
        return x


class DecoratedStack(PreTrainedModel):
    """Do nothing as often, as a model of transformers that can record it."""

    config_class = PretrainedConfig
    _can_record_outputs = {"hidden_states": Nothing}  # noqa: RUF012 - as transformers writes it

    def __init__(self, num_layers: int) -> None:
        super().__init__(PretrainedConfig())
        self.layers = nn.ModuleList(Nothing() for _ in range(num_layers))
        self.post_init()

    @capture_outputs
    def forward(self, x: torch.Tensor, **_: Any) -> BaseModelOutput:  # noqa: D102
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class Elsewhere(nn.Module):
    """Run a layer in another thread, on behalf of the call, as pipelines do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        def work() -> Any:
            with torch.no_grad():
                return self.inner(*args, **kwargs)

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(work).result()


def build_llama(sizes: Mapping[str, Any], dtype: str = "float32") -> nn.Module:
    """Build a Llama without a head, the same each time."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = LlamaModel(LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(usual)
    return model


def layers_of(model: Any) -> list[Any]:
    """List the layers, behind whatever wraps them."""
    return [layer.inner if hasattr(layer, "inner") else layer for layer in model.layers]


def run(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def mean(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean(dim=1)


# The ways: each gives what the layers gave, in order.


def by_lading(model: Any, inputs: Mapping[str, Any], call: Call = run, **options: Any) -> tuple[torch.Tensor, ...]:
    import lading

    with lading.capture(model, type(layers_of(model)[0]), **options) as seen:
        call(model, inputs)
    return tuple(seen[name] for name in seen.names)


def by_lading_views(model: Any, inputs: Mapping[str, Any], call: Call = run) -> tuple[torch.Tensor, ...]:
    return by_lading(model, inputs, call, view=True)


def by_lading_pooled(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    return by_lading(model, inputs, tokens="mean")


def by_flag(model: Any, inputs: Mapping[str, Any], call: Call = run) -> tuple[torch.Tensor, ...]:
    states: tuple[torch.Tensor, ...] = call(model, {**inputs, "output_hidden_states": True}).hidden_states
    return states[1:]


def by_flag_pooled(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    return tuple(map(mean, by_flag(model, inputs)))


def by_hooks(
    model: Any,
    inputs: Mapping[str, Any],
    call: Call = run,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[torch.Tensor, ...]:
    kept: list[torch.Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(keep(output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(hook) for layer in layers_of(model)]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(kept)


def by_hooks_pooled(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    return by_hooks(model, inputs, keep=mean)


def by_trace(model: Any, inputs: Mapping[str, Any], call: Call = run) -> tuple[torch.Tensor, ...]:
    del call  # it runs the model itself
    with model.trace(**inputs):
        kept = [(layer.inner if hasattr(layer, "inner") else layer).output for layer in model.layers].save()
    return tuple(each[0] if isinstance(each, tuple) else each for each in kept)


def by_trace_pooled(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    with model.trace(**inputs):
        kept = [layer.output.mean(1) for layer in model.layers].save()
    return tuple(kept)


def by_cache(model: Any, inputs: Mapping[str, Any], call: Call = run) -> tuple[torch.Tensor, ...]:
    del call
    _, cache = model.run_with_cache(**inputs)
    return tuple(cache.values())


def by_cache_pooled(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    kept: list[torch.Tensor] = []
    hooks = [(name, lambda tensor, hook: kept.append(mean(tensor))) for name in model.hook_dict]
    model.run_with_hooks(**inputs, fwd_hooks=hooks)
    return tuple(kept)


# What a model is made into, once.


def as_it_is(model: Any) -> Any:
    return model


_OPEN: list[Any] = []  # what is kept open until the process ends


def with_right_flags(model: Any) -> Any:
    from lading.adapters.transformers import thread_safe_outputs

    _OPEN.append(thread_safe_outputs(model))
    return model


def as_nnsight(model: Any) -> Any:
    from nnsight import NNsight

    return NNsight(model)


def as_transformer_lens(model: Any) -> Any:
    """Give a model a HookPoint behind each layer, as a user of TransformerLens does with a model of their own."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Hooked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.point = inner, HookPoint()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.point(self.inner(*args, **kwargs))

    class Root(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.setup()

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    if isinstance(model, Stack):  # a HookPoint does nothing by itself
        model.layers = nn.ModuleList(HookPoint() for _ in model.layers)
    else:
        model.layers = nn.ModuleList(Hooked(layer) for layer in model.layers)
    return Root().eval()


def with_empty_hooks(model: Any) -> Any:
    for layer in layers_of(model):
        layer.register_forward_hook(lambda *_: None)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Name one way. Immutable."""

    title: str
    capture: Callable[..., tuple[torch.Tensor, ...]]
    pooled: Callable[..., tuple[torch.Tensor, ...]] | None = None
    wrap: Callable[[Any], Any] = as_it_is
    interpreter: str = "here"
    """``here``; or that with transformers ``5``, ``4``, or the ``peers``."""
    stack: Callable[[int], nn.Module] = Stack
    is_tied: bool = False
    """Whether its last tensor is the model's output in place of the last layer's."""
    is_right: bool = True
    """Whether it gives tensors: the ceiling does not."""


_FLAG = {"capture": by_flag, "pooled": by_flag_pooled, "stack": DecoratedStack, "is_tied": True}
CONTENDERS = {
    "lading": Contender(title="lading.capture", capture=by_lading, pooled=by_lading_pooled),
    "view": Contender(title="lading.capture(view=True)", capture=by_lading_views),
    "flags": Contender(title="lading's thread_safe_outputs", **{**_FLAG, "wrap": with_right_flags}),
    "hooks": Contender(title="plain hooks, added and removed", capture=by_hooks, pooled=by_hooks_pooled),
    "five": Contender(title="transformers 5, output_hidden_states", interpreter="5", **_FLAG),
    "four": Contender(title="transformers 4, output_hidden_states", interpreter="4", **_FLAG),
    "nnsight": Contender(
        title="nnsight, trace", capture=by_trace, pooled=by_trace_pooled, wrap=as_nnsight, interpreter="peers"
    ),
    "lens": Contender(
        title="TransformerLens, run_with_cache",
        capture=by_cache,
        pooled=by_cache_pooled,
        wrap=as_transformer_lens,
        interpreter="peers",
    ),
    "empty": Contender(
        title="ceiling: a hook that does nothing",
        capture=lambda model, inputs, call=run: call(model, inputs),
        wrap=with_empty_hooks,
        is_right=False,
    ),
}


def has_flags() -> bool:
    """Say whether lading makes the flags right."""
    return find_spec("lading.adapters.transformers_flags") is not None
