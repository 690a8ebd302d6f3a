"""Tell how the installed transformers records outputs: one row of rules for each range of releases that differs.

A model's decorated ``forward`` leaves its outputs to a recorder, which transformers has rewritten several times. What
changed when was read in the sources of every minor release from 4.57 to 5.24. The gate is `find_recording`: it takes
the rules of the installed release and checks that the private names which they need are there; a form that it does not
know is an error by name. A release newer than the last change is taken for one of its kind, if it passes these checks.

Knows versions, private names and rules; reads no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import transformers

from lading.compat import release
from lading.errors import CaptureError, refusal


@dataclass(frozen=True, slots=True)
class Selection:
    """Which hidden states are kept, by their positions. Immutable."""

    positions: frozenset[int]
    counts_input: bool = True
    """Whether position 0 is what goes into the first layer; else that is left out, and 0 is what the layer gives."""


Select = Callable[[Any, Any, int], Selection | None]
"""Read a value of ``output_hidden_states``, given the recording, the model and the number of its states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the recorders of a range of releases have in common."""

    by_hooks: bool
    """Whether hooks record, for the innermost model's call alone; else layers' ``forward`` is replaced in each call."""
    has_keyed_registry: bool
    """Whether the table of declarations takes a model; else it takes the text of the model's class."""
    positions: str
    """What a list for ``output_hidden_states`` selects: ``flag`` (nothing: it means True), ``layers``, ``states``, or
    ``any`` where lading gives the meaning of ``states`` to a recorder that knows none."""
    warns_of_attentions: bool
    """Whether an attention that gives no weights is warned of."""
    joins_attentions: bool
    """Whether two declarations of attentions mean that every second entry is one of cross-attention."""
    matches_whole_parts: bool
    """Whether a part of a path that a declaration names is matched between dots; else anywhere in the path."""
    heeds_tie_in_config: bool
    """Whether a configuration may say that the last hidden state is not the model's output."""


_FIRST = Rules(
    by_hooks=False,
    has_keyed_registry=False,
    positions="any",
    warns_of_attentions=True,
    joins_attentions=True,
    matches_whole_parts=False,
    heeds_tie_in_config=False,
)
_CHANGES: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((5, 0), {"positions": "flag", "warns_of_attentions": False}),
    ((5, 2), {"by_hooks": True}),
    ((5, 14), {"joins_attentions": False, "matches_whole_parts": True}),
    ((5, 17), {"positions": "layers"}),
    ((5, 18), {"heeds_tie_in_config": True}),
    ((5, 23), {"has_keyed_registry": True, "positions": "states"}),
)
"""Since which release what is different from the release before."""


@cache
def rules() -> Rules:
    """Give the rules of the installed release."""
    return rules_of(release("transformers") or (0, 0))


def rules_of(version: tuple[int, int]) -> Rules:
    """Give the rules of one release."""
    found = _FIRST
    for since, changes in _CHANGES:
        found = replace(found, **changes) if version >= since else found
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The private parts of the installed recorder."""

    rules: Rules
    registry: dict[Any, Any]
    """Class of a model → what it declares."""
    decorated: Any
    """A function that the recorder stands around."""
    resolve: Callable[[Any, list[int]], set[int]] | None
    """Turn positions of hidden states into those from the start; None where ``positions`` is not ``states``."""

    def declared(self, model: Any) -> dict[str, Any]:
        """Give what the recorder knows of a model: keys of its output, and what modules give them.

        Raises:
            CaptureError: the model declares outputs that the recorder does not know of.
        """
        key = model if self.rules.has_keyed_registry else str(type(model))
        found: dict[str, Any] = self.registry.get(key) or {}
        promised = getattr(model, "_can_record_outputs", None) if not found else None
        if promised:
            raise CaptureError(
                refusal(
                    f"{type(model).__name__} in {_version()}",
                    found=f"no entry in the recorder's registry for what the class declares: {', '.join(promised)}",
                    expected="one, which transformers makes when a model of the class is built",
                    way_out="build the model with its class in this process; if it was, install a transformers that "
                    "lading's docs/versions.md lists",
                )
            )
        return found

    def select(self, model: Any, value: Any, count: int) -> Selection | None:
        """Give the hidden states that a value of ``output_hidden_states`` selects; None for all of them.

        Args:
            model: whose.
            value: of the flag.
            count: of the states, for the recorder that knows no positions.
        """
        kind = self.rules.positions
        if value is None or isinstance(value, bool) or kind == "flag":
            return None
        if kind == "layers":
            return Selection(frozenset(value), counts_input=False) if isinstance(value, (list, tuple, set)) else None
        listed = [value] if isinstance(value, int) else list(value)
        if self.resolve is not None:
            return Selection(frozenset(self.resolve(model, listed)))
        return Selection(frozenset(each % count for each in listed if -count <= each < count))


def find_recording() -> Recording:
    """Find the private parts of the installed transformers' recorder, and check that they are what the rules say.

    Raises:
        CaptureError: they are not.
    """
    found = rules()
    place = "transformers.utils.output_capturing" if found.by_hooks else "transformers.utils.generic"
    try:
        module = import_module(place)
    except ImportError as error:
        raise _unknown(place, f"none ({error})", "a module") from error
    decorator = _required(module, "capture_outputs" if found.by_hooks else "check_model_inputs")
    registry = _required(module, "_CAN_RECORD_REGISTRY")
    is_keyed = type(registry) is not dict
    if not isinstance(registry, dict) or is_keyed != found.has_keyed_registry:
        expected = "a dict that takes models" if found.has_keyed_registry else "a plain dict"
        raise _unknown(f"{place}._CAN_RECORD_REGISTRY", f"a {type(registry).__name__}", expected)
    decorated = decorator()(lambda self: None)
    if not (hasattr(decorated, "__code__") and hasattr(decorated, "__wrapped__")):
        raise _unknown(f"{place}.{decorator.__name__}", f"a {type(decorated).__name__}", "a function around a function")
    resolve = _required(module, "resolve_hidden_states_indices") if found.positions == "states" else None
    return Recording(rules=found, registry=registry, decorated=decorated, resolve=resolve)


def _required(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise _unknown(f"{module.__name__}.{name}", "none", "what lading's rules for this release read")
    return getattr(module, name)


def _unknown(subject: str, found: str, expected: str) -> CaptureError:
    return CaptureError(
        refusal(
            f"{subject} in {_version()}",
            found=found,
            expected=expected,
            way_out="install a transformers that lading's docs/versions.md lists, or use lading.capture",
        )
    )


def _version() -> str:
    return f"transformers {transformers.__version__}"
