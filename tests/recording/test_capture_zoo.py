"""What transformers returns for ``output_hidden_states=True`` is what plain sites see, on every architecture."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from named_architectures import ABSENT, EXTRA, NAMED
from torch import nn

import lading
from architectures import MAJOR, PUBLIC
from zoo import BY_NAME, EVERY, QUIET, tensors

pytestmark = QUIET

# What models return and no module gives: transposed, reshaped, cut or joined on the way out.
NO_MODULES = re.compile(r"outputs\.(image|reshaped)_hidden_states")
REARRANGED = {
    "deformable_detr": r"outputs\.intermediate_hidden_states",  # the decoder's, stacked
    "edgetam_video": r"outputs\.fpn_hidden_states",  # flattened
    "clap": r"outputs\.audio_model_output\.hidden_states",
    "fsmt": r"outputs\.(encoder_hidden_states\[[01]\]|decoder_hidden_states)",
    "pegasus_x": r"outputs\.encoder_hidden_states\[2\]\[1\]",  # global tokens of the final norm
    "prophetnet": r"outputs\.decoder_(ngram_)?hidden_states",
    "rwkv": r"outputs\.hidden_states\[1\]",
    "squeezebert": r"outputs\.hidden_states\[1\]",
    "xlnet": r"outputs\.hidden_states\[[01]\]",
}


NONE_RETURNED = {"mimi", "siglip"} | ({"edgetam", "edgetam_video"} if MAJOR == 4 else set())  # they take the flag


def stacked_layers(model: nn.Module) -> list[str]:
    """Name the members of module lists: what models loop over."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name in module._modules
    ]


def find_sites(model: nn.Module, inputs: dict, method=None) -> list[str]:
    """Name every input and output that is a tensor or begins with one, by trying them."""
    found: dict[str, None] = {}
    handles = []
    layers = set(stacked_layers(model))

    def keep(path: str):
        def hook(_module, args, kwargs, output):
            first = output if isinstance(output, torch.Tensor) else next(iter(_values(output)), None)
            if isinstance(first, torch.Tensor):
                found.setdefault(path)
            if path in layers and any(isinstance(each, torch.Tensor) for each in (*args, *kwargs.values())):
                found.setdefault(f"{path}:input")

        return hook

    handles = [
        module.register_forward_hook(keep(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    with torch.no_grad():
        (method or model)(**inputs)
    for handle in handles:
        handle.remove()
    return list(found)


def _values(output) -> list:
    return list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple) else []


def of_name(name: str) -> list:
    """List the entries of one name, in the zoo and beside it, that transformers has here."""
    entries = [*BY_NAME.values(), *(each for each in EXTRA if each.is_available)]
    return [each for each in entries if each.name == name or each.name.startswith(f"{name}-")]


def test_no_architecture_of_the_issue_drops_out():
    assert [name for name in NAMED if not of_name(name)] == list(ABSENT)
    for name, model_class in ABSENT.items():
        assert model_class not in PUBLIC, name


def compare(architecture, seen, output) -> int:
    """Hold what a flag returned against what sites saw; count it."""
    kept = [tensor for name in seen for tensor in seen.calls(name)]
    returned = [(path, tensor) for path, tensor in tensors(output) if "hidden_states" in path]
    told = [(path, tensor) for path, tensor in returned if not is_rearranged(architecture, path)]
    for path, tensor in told:
        assert any(each.shape == tensor.shape and torch.equal(each, tensor) for each in kept), path
    return len(returned)


def is_rearranged(architecture, path: str) -> bool:
    return bool(NO_MODULES.match(path) or re.match(REARRANGED.get(architecture.name, "(?!)"), path))


@pytest.mark.parametrize("architecture", [pytest.param(each, id=each.name) for each in EXTRA if each.is_available])
def test_plain_sites_see_the_hidden_states_of_architectures_beside_the_zoo(architecture):
    model, inputs = architecture.build(), architecture.inputs()
    method = model if architecture.forward == "__call__" else getattr(model, architecture.forward)
    with torch.no_grad(), lading.capture(model, find_sites(model, inputs, method)) as seen:
        output = method(**inputs, output_hidden_states=True)
    assert compare(architecture, seen, output) or architecture.name in NONE_RETURNED


@pytest.mark.parametrize("architecture", EVERY)
def test_plain_sites_see_every_hidden_state_that_the_flag_returns(architecture):
    model, inputs = architecture.build().eval(), architecture.inputs()
    accepted = inspect.signature(model.forward).parameters
    if "output_hidden_states" not in accepted and not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        return  # nothing to compare with
    if architecture.forward != "__call__":
        return
    with torch.no_grad(), lading.capture(model, find_sites(model, inputs)) as seen:
        output = model(**inputs, output_hidden_states=True)
    assert compare(architecture, seen, output) or architecture.name in NONE_RETURNED
