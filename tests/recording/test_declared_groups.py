"""The names that architectures declare: the same tuples as transformers returns for its own flags."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lading
from architectures import MAJOR
from zoo import BY_NAME, EVERY, QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]
FLAGS = {
    "hidden_states": "output_hidden_states",
    "attentions": "output_attentions",
    "cross_attentions": "output_attentions",
    "router_logits": "output_router_logits",
}
# What an architecture returns under a name, and no module gives: pegasus_x declares a dict.
REARRANGED = {("pegasus_x", "attentions")}
if MAJOR == 4:
    REARRANGED |= {
        ("minimax", "attentions"),  # of two classes of self-attention it returns one, taking the other for cross
        ("diffllama", "attentions"),  # its implementation is fixed when it is built, and the flag warns of it
        ("qwen3_vl_moe", "hidden_states"),  # adds images' states into what its layers gave
    }


def returned(output, name: str) -> list[tuple[torch.Tensor, ...]]:
    """List all tuples of tensors of one name, at any depth of the output."""
    found = []
    for key, value in output.items():
        is_tuple = isinstance(value, (tuple, list)) and value and all(isinstance(each, torch.Tensor) for each in value)
        if is_tuple and key.endswith(name) and (key == name or key == f"encoder_{name}" or key == f"decoder_{name}"):
            found.append(tuple(value))
        elif hasattr(value, "items"):
            found += returned(value, name)
    return found


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("architecture", EVERY)
def test_a_group_is_the_tuple_that_the_flag_returns(architecture, name):
    model, inputs = architecture.build().eval(), architecture.inputs()
    try:
        seen = lading.capture(model, name)
    except lading.CaptureError:
        return  # undeclared: refused, see below
    if name != "hidden_states":
        model.set_attn_implementation("eager")
    if (architecture.name, name) in REARRANGED or architecture.forward != "__call__":
        return
    with torch.no_grad(), seen:
        output = model(**inputs, **{FLAGS[name]: True})
    tuples = []
    for group in seen.groups:
        try:
            tuples.append(seen.group(group))
        except lading.CaptureError:
            continue  # a model inside that this call did not use
    for expected in returned(output, name):
        assert any(same(expected, each) for each in tuples)


def test_one_model_gives_the_group_as_an_attribute():
    llama = BY_NAME["llama"]
    with torch.no_grad(), lading.capture(llama.build().eval(), "hidden_states") as seen:
        seen._model(**llama.inputs())
    assert seen.groups == ("hidden_states",)
    assert len(seen.hidden_states) == len(seen._model.model.layers) + 1


@pytest.mark.transformers5
def test_an_encoder_and_a_decoder_each_have_their_group():
    model = BY_NAME["moonshine"].build()  # declares in every release of transformers 5
    assert [
        each.partition(".hidden")[0].removeprefix("model.") for each in lading.capture(model, "hidden_states").groups
    ] == ["encoder", "decoder"]


def test_what_is_not_declared_is_refused_with_what_is():
    with pytest.raises(lading.CaptureError, match=r"'router_logits' of Llama.*expected one of 'attentions', 'hidden"):
        lading.capture(BY_NAME["llama"].build(), "router_logits")
    with pytest.raises(lading.CaptureError, match=r"no declaration of anything in 'decoder.*would look like all"):
        lading.capture(BY_NAME["vision_encoder_decoder-trocr"].build(), "hidden_states")
    with pytest.raises(lading.CaptureError, match="a model that declares what it can return"):
        lading.capture(nn.Linear(2, 2), "hidden_states")


def test_attentions_that_the_implementation_does_not_compute_are_refused():
    llama = BY_NAME["llama"]
    model = llama.build().eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), lading.capture(model, "attentions") as seen:
        model(**llama.inputs())
    with pytest.raises(lading.CaptureError, match='under attn_implementation="eager" alone'):
        seen.group("attentions")
