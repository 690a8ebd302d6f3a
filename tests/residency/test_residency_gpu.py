"""Host → GPU and disk → GPU on a real device: the bits of a model that rests there, from several streams at once."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lading

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8, vocab_size=999
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(model_path):
    model = lading.load(model_path, device_map={"": 0})
    with torch.no_grad():
        return [model(ids.cuda()).logits for ids in inputs()]


def inputs() -> list[torch.Tensor]:
    return [torch.randint(0, 999, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def plan_of(model_path, share: float, home: str) -> lading.Plan:
    total = sum(path.stat().st_size for path in model_path.glob("*.safetensors"))
    return lading.plan(model_path, {0: int(total * share), home: 4 * total})


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_streamed_forwards_equal_resident_ones(model_path, expected, share, home):
    plan = plan_of(model_path, share, home)
    model = lading.load(model_path, plan=plan)
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        for _ in range(3):
            for ids, logits in zip(inputs(), expected, strict=True):
                found = model(ids).logits
                assert found.device.type == "cpu"  # where the ids came from
                assert torch.equal(found, logits.cpu())
    assert torch.cuda.memory_allocated() == before
    assert not any(weight.is_meta for weight in model.parameters())
    lading.Residency.of(model).close()
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_threads_on_streams_of_their_own_get_their_own_answers(model_path, expected, home):
    model = lading.load(model_path, plan=plan_of(model_path, 0.5, home))
    wrong: list[object] = []
    barrier = threading.Barrier(len(expected))

    def call(number: int) -> None:
        barrier.wait()
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                ids = inputs()[number].cuda()
                for _ in range(50):
                    if not torch.equal(model(ids).logits, expected[number]):
                        wrong.append(number)
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


def test_generate_equals_the_resident_model(model_path):
    ids = inputs()[0]
    resident = lading.load(model_path, device_map={"": 0})
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = resident.generate(ids.cuda(), **options).cpu()
    model = lading.load(model_path, plan=plan_of(model_path, 0.5, "cpu"))
    assert torch.equal(model.generate(ids.cuda(), **options).cpu(), expected)


def test_an_edit_of_a_home_is_copied_next_time(model_path):
    model = lading.load(model_path, plan=plan_of(model_path, 0.5, "cpu"))
    ids = inputs()[0]
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data.mul_(2)
        assert not torch.equal(model(ids).logits, before)


def test_pinned_homes_take_their_own_bytes(model_path):
    """torch's pinned allocator rounds up to powers of two; registered memory does not pass through it."""
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    model = lading.load(model_path, plan=plan_of(model_path, 0.5, "cpu"))
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
    assert lading.Residency.of(model) is not None
