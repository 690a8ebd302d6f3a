"""Make the problems that planners are compared on: models without weights, and memory to put them in.

Models: every class of transformers' own tables whose default configuration builds on meta, or else the tiny one of the
tests, but for heads that add a linear layer to a base model that is there already; and plain modules. Memory: twenty
scenarios, in proportion to each model. Knows no planner.
"""

from __future__ import annotations

import copy
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from plan_check import Device, Unit, least_equal

MAJOR = int(transformers.__version__.split(".", 1)[0])
_LIMIT_S = 120
_SMALL_HEADS = (
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "XVECTOR"),
    *("NEXT_SENTENCE", "AUDIO_CLASSIFICATION", "AUDIO_FRAME", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    *("TEXT_ENCODING", "FOR_IMAGE_MAPPING", "BACKBONE", "WITH_LM_HEAD", "CONFIG_MAPPING"),
)
FEW = (
    *("BertModel", "BertForMaskedLM", "AlbertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"),
    *("WhisperForConditionalGeneration", "CLIPModel", "DetrForObjectDetection", "ViTModel", "MambaForCausalLM"),
    *("LlamaForCausalLM", "XLNetLMHeadModel"),
)
"""The architectures of a tiny run."""


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """Say why a model cannot be built here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name a model and say how to build it. Immutable."""

    name: str
    make: Callable[[], nn.Module]
    is_plain: bool = False
    """Not a transformers model."""
    is_timed: bool = False
    """Planned many times over, to be reported by itself."""

    def build(self) -> nn.Module:
        """Build it on meta.

        Raises:
            Skip: it cannot be built, or takes too long, or holds nothing.
        """
        try:
            with time_limit(_LIMIT_S):
                model = self.make()
        except Skip:
            raise
        except Exception as error:  # anything can go wrong in two thousand classes
            raise Skip(type(error).__name__) from error
        if not any(tensor.numel() for tensor in model.parameters()):
            raise Skip("no parameters")
        return model


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Break off what takes longer; in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def no_split_of(model: nn.Module) -> list[str]:
    """List the classes that a model declares unsplittable."""
    return sorted(getattr(model, "_no_split_modules", None) or [])


# transformers' architectures


def class_names() -> list[str]:
    """List the model classes that transformers' tables name, each once."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, None] = {}
    for table in sorted(name for name in dir(tables) if name.endswith("_MAPPING_NAMES")):
        if not any(head in table for head in _SMALL_HEADS):
            for entry in getattr(tables, table).values():
                names = entry if isinstance(entry, (tuple, list)) else [entry]
                found.update(dict.fromkeys(name for name in names if name))
    return sorted(found)


def transformers_cases(names: Sequence[str] | None = None) -> list[Case]:
    """List the architectures; nothing is imported yet."""
    listed = class_names() if names is None else names
    tiny = [] if names is not None else [name for name in tiny_architectures() if name not in set(listed)]
    return [Case(name=name, make=lambda name=name: build_architecture(name)) for name in [*listed, *tiny]]


@cache
def tiny_architectures() -> dict[str, Any]:
    """Read the table of tiny models that loading is tested on: class name → its first entry."""
    folder = str(Path(__file__).resolve().parent.parent / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from architectures import AVAILABLE

    return {entry.model_class: entry for entry in reversed(AVAILABLE)}


def build_architecture(name: str) -> nn.Module:
    """Build a model of a class with its default configuration, else with the tiny one, and tie it."""
    cls = getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise Skip("no such class here")
    try:
        model = build_on_meta(lambda: cls(cls.config_class()))
    except Exception:
        entry = tiny_architectures().get(name)
        if entry is None:
            raise
        model = build_on_meta(lambda: cls(cls.config_class(**copy.deepcopy(entry.config))))
        if entry.prepare is not None:
            entry.prepare(model)
    return model


def build_on_meta(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build without memory; where a constructor reads numbers, with parameters alone on meta."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        try:
            with torch.device("meta"):
                model = make()
        except (RuntimeError, NotImplementedError, ValueError):
            from accelerate import init_empty_weights

            with init_empty_weights():
                model = make()
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


# Modules without an architecture, and giants


class Layer(nn.Module):
    """Hold ten modules, itself included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"})
        self.feed_forward = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])


class Layers(nn.Module):
    """Hold layers, which must stay whole or need not."""

    def __init__(self, num_layers: int, width: int, *, are_whole: bool) -> None:
        super().__init__()
        self._no_split_modules = ["Layer"] if are_whole else []
        self.embedding = nn.Embedding(1000, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(num_layers)])
        self.head = nn.Linear(width, 1000)


def plain_cases(*, tiny: bool = False) -> list[Case]:
    """List what is timed by itself: plain modules of 8,500 modules, a 70B Llama, a 671B DeepSeek V3."""
    num_layers, shrunk = (20, {"num_hidden_layers": 8}) if tiny else (850, {})
    num_modules = f"{10 * num_layers:,} modules"
    llama = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}

    def layers(*, are_whole: bool) -> nn.Module:
        return build_on_meta(lambda: Layers(num_layers, 64, are_whole=are_whole))

    def giant(name: str, **config: Any) -> nn.Module:
        cls = getattr(transformers, name, None)
        if cls is None:
            raise Skip("no such class here")
        return build_on_meta(lambda: cls(cls.config_class(**{**config, **shrunk})), torch.bfloat16)

    return [
        Case(name="Llama 70B", is_timed=True, make=lambda: giant("LlamaForCausalLM", num_hidden_layers=80, **llama)),
        Case(name="DeepSeek V3 671B", is_timed=True, make=lambda: giant("DeepseekV3ForCausalLM")),
        Case(name=f"{num_modules} in layers", is_plain=True, is_timed=True, make=lambda: layers(are_whole=True)),
        Case(name=f"{num_modules}, all loose", is_plain=True, is_timed=True, make=lambda: layers(are_whole=False)),
    ]


# Memory

SINGLE = ("95 %", "75 %", "50 %", "25 %", "10 %", "exact fit on one", "half a block", "30 %, limited cpu", "40 %, disk")
"""Scenarios with one accelerator."""


def scenarios_of(units: Sequence[Unit]) -> dict[str, dict[Device, int]]:
    """Give memory in proportion to a model; ample host memory and a disk without limit behind it, unless named."""
    total, largest = sum(map(sum, units)), max(map(sum, units))
    ample: dict[Device, int] = {"cpu": 10 * total}

    def equal(count: int, percent: int) -> list[int]:
        return [total * percent // 100 // count] * count

    def shares(*percents: int) -> list[int]:
        return [total * percent // 100 for percent in percents]

    accelerators: dict[str, list[int]] = {
        **{f"{percent} %": shares(percent) for percent in (95, 75, 50, 25, 10)},
        "2 equal, 110 %": equal(2, 110),
        "4 equal, 110 %": equal(4, 110),
        "8 equal, 130 %": equal(8, 130),
        "2 equal, 70 %": equal(2, 70),
        "20 + 35 + 60 %": shares(20, 35, 60),
        "60 + 30 + 20 %": shares(60, 30, 20),
        "15 + 15 + 40 + 40 %": shares(15, 15, 40, 40),
        "30 + 10 + 25 %": shares(30, 10, 25),
        "tiny first, 2 + 110 %": shares(2, 110),
        "exact fit on one": [total],
        "exact fit on two": [least_equal(units, 2)] * 2,
        "half a block": [largest // 2],
    }
    disk = total * 45 // 100 + 1
    return {
        **{name: {**dict(enumerate(sizes)), **ample} for name, sizes in accelerators.items()},
        "no accelerator, 60 % cpu": {"cpu": total * 60 // 100},
        "30 %, limited cpu": {0: total * 30 // 100, "cpu": total * 20 // 100},
        "40 %, disk": {0: total * 40 // 100, "cpu": total * 25 // 100, "disk": disk},
    }
