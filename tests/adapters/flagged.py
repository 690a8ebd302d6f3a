"""Share what the tests of transformers' flags have in common: models that give everything, calls, comparisons."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from architectures import Architecture
from lading.adapters.transformers_recorder import find_recorder
from zoo import BY_NAME, QUIET

HIDDEN, ATTENTIONS, ROUTER = "output_hidden_states", "output_attentions", "output_router_logits"
MARKS = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning"),
]
ROWS = torch.arange(8 * 2 * 9).reshape(8, 2, 9) % 80 + 10


def build(architecture: Architecture, **settings: bool):
    """Build a model whose attention gives weights, and write flags into all of its configurations."""
    model = architecture.build()
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("eager")
    for part in model.modules():
        for name, value in settings.items():
            config = getattr(part, "config", None)
            if hasattr(config, name) and (name != ATTENTIONS or config._attn_implementation == "eager"):
                setattr(config, name, value)
    return model


def outcome(architecture: Architecture, model: nn.Module, **flags):
    """Give what a call returns or raises."""
    torch.manual_seed(0)
    method = model if architecture.forward == "__call__" else getattr(model, architecture.forward)
    try:
        with torch.no_grad():
            return method(**architecture.inputs(), **flags)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return type(error).__name__, str(error)


def same(one, other) -> bool:
    """Compare nested outputs bit for bit: types, keys, their order, every tensor and every None."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one).__module__.startswith("transformers.") and hasattr(one, "__dict__"):
        return same(dict(vars(one)), dict(vars(other)))
    return True


def decorated(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if find_recorder(type(each).forward) is not None]


def hooks(model: nn.Module) -> int:
    """Count lading's hooks; transformers 5 leaves some of its own where it recorded."""
    tables = [table for each in model.modules() for table in (each._forward_hooks, each._forward_pre_hooks)]
    return sum(type(hook).__module__.startswith("lading.") for table in tables for hook in table.values())


def attributes(model: nn.Module) -> list[dict]:
    return [
        {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(each).items()}
        for each in model.modules()
    ]


def llama(name: str = "qwen3"):
    return BY_NAME[name].build()


def states(model: nn.Module, rows: torch.Tensor, **flags):
    with torch.no_grad():
        return model(input_ids=rows, **{HIDDEN: True, **flags})
