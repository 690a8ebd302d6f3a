"""What each release of transformers does with flags is told by its version; a form that is not known is an error."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import transformers
from flagged import MARKS, hooks, llama

import lading
from lading.adapters import transformers_recorder, transformers_releases
from lading.adapters.transformers import thread_safe_outputs
from lading.adapters.transformers_releases import Recording, Selection, find_recording, rules, rules_of

pytestmark = MARKS
RELEASES = {
    (4, 57): "replaces forwards, any, warns, joins, parts anywhere",
    (5, 0): "replaces forwards, flag, joins, parts anywhere",
    (5, 1): "replaces forwards, flag, joins, parts anywhere",
    (5, 2): "hooks, flag, joins, parts anywhere",
    (5, 13): "hooks, flag, joins, parts anywhere",
    (5, 14): "hooks, flag",
    (5, 17): "hooks, layers",
    (5, 18): "hooks, layers, tie in configuration",
    (5, 22): "hooks, layers, tie in configuration",
    (5, 23): "hooks, states, tie in configuration, keyed registry",
    (5, 99): "hooks, states, tie in configuration, keyed registry",
}


def described(found):
    yield "hooks" if found.by_hooks else "replaces forwards"
    yield found.positions
    yield from ["warns"] * found.warns_of_attentions
    yield from ["joins"] * found.joins_attentions
    yield from ["parts anywhere"] * (not found.matches_whole_parts)
    yield from ["tie in configuration"] * found.heeds_tie_in_config
    yield from ["keyed registry"] * found.has_keyed_registry


@pytest.mark.parametrize("version", RELEASES, ids=str)
def test_rules_of_each_release_are_what_its_sources_say(version):
    assert ", ".join(described(rules_of(version))) == RELEASES[version]


@pytest.mark.parametrize(
    ("version", "value", "expected"),
    [
        ((4, 57), [0, -1, 9], Selection(frozenset({0, 4}))),
        ((4, 57), -5, Selection(frozenset({0}))),
        ((5, 10), [0, -1, 9], None),
        ((5, 10), 1, None),
        ((5, 20), [0, -1, 9], Selection(frozenset({0, -1, 9}), counts_input=False)),
        ((5, 20), 1, None),
        ((5, 23), [0, -1, 9], Selection(frozenset({"resolved", 0, -1, 9}))),
        ((5, 23), 1, Selection(frozenset({"resolved", 1}))),
        ((5, 23), True, None),
    ],
)
def test_a_list_or_a_number_selects_what_it_selects_in_each_release(version, value, expected):
    found = rules_of(version)
    resolve = (lambda _, listed: {"resolved", *listed}) if found.positions == "states" else None
    recording = Recording(rules=found, registry={}, decorated=None, resolve=resolve)
    assert recording.select(None, value, 5) == expected


def recorder_module():
    from transformers.utils import generic

    return inspect.getmodule(find_recording().decorated.__code__) or generic


PLACE = r"transformers\.utils\.(output_capturing|generic)"
VERSION = transformers.__version__.replace(".", r"\.")
WAY_OUT = r"install a transformers that lading's docs/versions\.md lists"


@pytest.mark.parametrize("kind", [list, type("Registry", (dict,), {}), dict])
def test_a_registry_of_an_unknown_form_is_refused_by_name(kind, monkeypatch):
    if (kind is not list) and (kind is not dict) == rules().has_keyed_registry:
        kind = tuple  # the other one is this release's own
    monkeypatch.setattr(recorder_module(), "_CAN_RECORD_REGISTRY", kind())
    found = rf"{PLACE}\._CAN_RECORD_REGISTRY in transformers {VERSION}: found a {kind.__name__} · expected a .*dict"
    with pytest.raises(lading.CaptureError, match=rf"{found}.*{WAY_OUT}"):
        find_recording()


@pytest.mark.parametrize("part", ["registry", "decorator", "positions"])
def test_a_part_of_the_recorder_that_upstream_renames_is_refused_by_name(part, monkeypatch):
    names = {"registry": "_CAN_RECORD_REGISTRY", "positions": "resolve_hidden_states_indices"}
    name = names.get(part, "capture_outputs" if rules().by_hooks else "check_model_inputs")
    if part == "positions" and rules().positions != "states":
        name = "_CAN_RECORD_REGISTRY"
    monkeypatch.delattr(recorder_module(), name)
    with pytest.raises(lading.CaptureError, match=rf"{PLACE}\.{name} in transformers {VERSION}: found none.*{WAY_OUT}"):
        find_recording()


def test_a_decorator_of_another_kind_is_refused_by_name(monkeypatch):
    name = "capture_outputs" if rules().by_hooks else "check_model_inputs"
    monkeypatch.setattr(recorder_module(), name, lambda: lambda function: function)
    with pytest.raises(lading.CaptureError, match=rf"{PLACE}\..* found a function · expected a function around"):
        find_recording()


def test_a_model_that_declares_outputs_without_an_entry_in_the_registry_is_refused(monkeypatch):
    empty = dataclasses.replace(transformers_recorder.RECORDING, registry={})
    monkeypatch.setattr(transformers_recorder, "RECORDING", empty)
    model = llama()
    with pytest.raises(lading.CaptureError, match=r"Qwen3Model in transformers .*: found no entry.*hidden_states"):
        thread_safe_outputs(model)
    assert hooks(model) == 0


def test_a_recorder_that_no_model_of_transformers_has_is_refused_not_taken_for_nothing_to_protect(monkeypatch):
    monkeypatch.setattr(transformers_recorder, "_CODE", (lambda: None).__code__)
    with pytest.raises(lading.CaptureError, match=r"LlamaModel\.forward in transformers .*: found no recorder"):
        thread_safe_outputs(llama())


def test_a_model_that_collects_by_itself_needs_nothing():
    class Alone(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def forward(self, input_ids):
            return input_ids

    with thread_safe_outputs(Alone(transformers.LlamaConfig())) as handle:
        assert hooks(handle._model) == 0


def test_the_release_is_read_from_the_installed_package():
    assert transformers_releases.release("transformers") == tuple(map(int, transformers.__version__.split(".")[:2]))
    assert transformers_releases.release("no-such-package") is None
