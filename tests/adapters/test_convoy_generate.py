"""Many sequences decode together: tokens of each generated alone, weights fetched once a step, caches of its own."""

from __future__ import annotations

import copy

import pytest
import torch

import lading
from zoo import BY_NAME, QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::lading.PlanWarning")]
NAMES = ["qwen2-tied", "gpt2", "t5", "mixtral"]


def prompts(count: int = 5) -> list[dict[str, torch.Tensor]]:
    """Give prompts of different lengths, every other one of two rows with padding on the left."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(count):
        ids = torch.randint(10, 99, (1 + number % 2, 3 + 2 * number), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, 0] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def alone(model, options: dict, seed: int = 0) -> list[torch.Tensor]:
    """Generate one by one."""
    found = []
    for index, prompt in enumerate(prompts()):
        with torch.random.fork_rng():
            torch.manual_seed(seed + index)
            found.append(model.generate(**prompt, **options))
    return found


def same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_decode_together_are_those_that_decode_alone(name, way):
    model = BY_NAME[name].build()
    options = {**WAYS[way], "max_new_tokens": 5, "pad_token_id": 0}
    expected = alone(model, options, seed=7)
    with lading.offload(model, {"": "disk"}):
        assert same(list(lading.convoy(model.generate, prompts(), width=3, seed=7, **options)), expected)
        assert same(list(lading.convoy(model.generate, prompts(), seed=7, **options)), expected)


def test_sequences_that_end_early_leave_and_the_others_go_on():
    model = BY_NAME["qwen2-tied"].build()
    lengths = [1, 6, 2, 5, 3]

    def call(pair: tuple[int, dict]) -> torch.Tensor:
        return model.generate(
            **pair[1], max_new_tokens=pair[0], min_new_tokens=pair[0], do_sample=False, pad_token_id=0
        )

    pairs = list(zip(lengths, prompts(), strict=True))
    expected = [call(pair) for pair in pairs]
    with lading.offload(model, {"": "disk"}):
        found = list(lading.convoy(model, pairs, function=call, width=5))
        assert same(found, expected)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    free = alone(model, options)
    starts = [prompt["input_ids"].shape[1] for prompt in prompts()]
    said = [output[0, start:].tolist() for output, start in zip(free, starts, strict=True)]
    ends = next(token for token in said[0] if not all(token in each for each in said))  # some end with it, some do not
    expected = alone(model, {**options, "eos_token_id": ends})
    assert len({output.shape[1] - start for output, start in zip(expected, starts, strict=True)}) > 1
    options["eos_token_id"] = ends
    with lading.offload(model, {"": "disk"}):
        assert same(list(lading.convoy(model.generate, prompts(), width=5, **options)), expected)


def test_each_step_fetches_the_weights_once_for_all():
    model = BY_NAME["olmo"].build()
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    expected = alone(model, options)
    with lading.offload(model, {"": "disk"}) as residency:
        total = sum(residency._parts.supply().sizes)
        with lading.convoy(model.generate, prompts(), width=5, **options) as outputs:
            assert same(list(outputs), expected)
            stats = outputs.stats()
        assert (stats.batches, stats.crossings, stats.width) == (5, 1, 5)
        assert stats.fetched_bytes <= 4 * total


REFUSED = r"a convoy of sequences: found .*expected a cache for each batch.*\"dynamic\""


@pytest.mark.parametrize(
    "where",
    [
        "argument",
        "given config",
        "own config",
        "own config beside one",
        "cache",
        "cache by its new name",
        "batch",
        "batch's config",
    ],
)
def test_a_static_cache_is_refused(where):
    from transformers import DynamicCache, GenerationConfig

    model = BY_NAME["qwen2-tied"].build()
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation = "static"
    constants = {
        "argument": {"cache_implementation": "static"},
        "given config": {"generation_config": config},
        "own config beside one": {"generation_config": GenerationConfig()},
        "cache": {"past_key_values": DynamicCache()},
        "cache by its new name": {"cache": DynamicCache()},  # since transformers 5.24
    }.get(where, {})
    more = {"batch": {"cache_implementation": "static"}, "batch's config": {"generation_config": config}}.get(where, {})
    batches = [{**prompt, **more} for prompt in prompts()]
    if where.startswith("own config"):
        model.generation_config = config
    with lading.offload(model, {"": "disk"}):
        with pytest.raises(lading.ResidencyError, match=REFUSED):
            list(lading.convoy(model.generate, batches, width=2, max_new_tokens=2, **constants))
        model.generation_config.cache_implementation = None
        options = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
        assert len(list(lading.convoy(model.generate, prompts(), width=2, **options))) == 5


def test_the_caches_that_old_checkpoints_name_but_transformers_makes_dynamic_are_no_obstacle():
    model = BY_NAME["qwen2-tied"].build()
    model.generation_config.cache_implementation = "hybrid"
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    with lading.offload(model, {"": "disk"}):
        outputs = list(lading.convoy(model.generate, prompts(), width=3, **options))
    assert same(outputs, alone(model, options))
