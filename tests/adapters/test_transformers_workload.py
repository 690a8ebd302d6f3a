"""The memory beside the weights is what transformers allocates: caches to the byte, scores, and the order of calls."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from architectures import AVAILABLE, ids
from lading.adapters.transformers_caches import CACHE_NAMES
from lading.adapters.transformers_workload import call_order, memory_terms
from lading.errors import PlanError
from lading.placement.workload import Workload

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DECODERS = {
    "llama, grouped queries": ("llama", {**SMALL, "num_key_value_heads": 2}),
    "mistral, sliding window": ("mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 8}),
    "gemma2, every other layer slides": (
        "gemma2",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "deepseek_v3, latent": (
        "deepseek_v3",
        {
            **SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": ("gpt2", {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
}


def cache_bytes(cache):
    """Add up the storages of a cache of either version; a sliding window is a view that keeps all of its prompt."""
    tensors, seen = [], set()
    pending = [cache]
    while pending:
        found = pending.pop()
        if isinstance(found, torch.Tensor):
            tensors.append(found)
        elif isinstance(found, (list, tuple, dict)):
            pending.extend(found.values() if isinstance(found, dict) else found)
        elif found is not None and hasattr(found, "__dict__") and id(found) not in seen:
            seen.add(id(found))
            pending.extend(vars(found).values())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", DECODERS)
def test_cache_is_that_of_a_real_forward_to_the_byte(name):
    kind, fields = DECODERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    ids = torch.randint(10, 99, (2, 24))
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    terms = memory_terms(model, Workload(batch_size=2, num_tokens=24))
    assert sum(terms.kv_cache.values()) == cache_bytes(out.past_key_values) > 0
    assert len(terms.kv_cache) == len({*terms.kv_cache})
    assert terms.source["kv_cache"] == "traced"
    assert terms.logits == out.logits.nbytes


GENERATORS = ("llama", "mistral", "gemma2", "gemma3_text", "deepseek_v3", "llava", "t5", "bart", "whisper", "jamba",
    "bamba", "falcon_h1", "qwen3_next")  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
def test_cache_is_that_of_a_real_generation_to_the_byte(name):
    architecture = next(each for each in AVAILABLE if each.name == name)
    model, prompt = architecture.build(), ids(12)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if name == "whisper":
        given = {"input_features": architecture.inputs()["input_features"], "decoder_input_ids": prompt}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**given, **settings, pad_token_id=0)
    terms = memory_terms(model, Workload(batch_size=2, num_tokens=12, new_tokens=5))  # the sixth is never fed back
    assert terms.source["kv_cache"] == "traced"
    assert sum(terms.kv_cache.values()) == cache_bytes(out.past_key_values) > 0
    config = model.config.get_text_config(decoder=True)
    assert len([owner for owner in terms.kv_cache if any(map(str.isdigit, owner))]) == config.num_hidden_layers


def test_cache_that_a_forward_does_not_give_is_refused_or_none():
    architecture = next(each for each in AVAILABLE if each.name == "recurrent_gemma")
    model = architecture.build()
    if set(CACHE_NAMES) & set(inspect.signature(model.forward).parameters):  # of its caller, who does not get it back
        with pytest.raises(PlanError, match="RecurrentGemmaForCausalLM: found no cache"):  # or estimated, and why
            raise PlanError(memory_terms(model, Workload(num_tokens=12)).source["kv_cache"])
    else:  # kept in the modules, and counted among the activations
        assert memory_terms(model, Workload(num_tokens=12)).kv_cache == {}


def llama(forward=None):
    """Build a small Llama; its forward replaced by one around its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1]))
    if forward is not None:
        model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return model


@dataclass
class Renamed(transformers.utils.ModelOutput):
    logits: torch.Tensor | None = None
    memory: object = None


def test_cache_that_upstream_renames_is_counted_all_the_same():
    own = type(llama()).forward
    name = next(each for each in CACHE_NAMES if each in inspect.signature(own).parameters)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, memory=None, logits_to_keep=0):
        given = {name: memory, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}
        output = own(self, input_ids=input_ids, use_cache=use_cache, **given)
        return Renamed(logits=output.logits, memory=output[name])

    workload = Workload(batch_size=2, num_tokens=12, new_tokens=5)
    assert memory_terms(llama(forward), workload) == memory_terms(llama(), workload)


def test_cache_that_a_forward_takes_by_an_older_name_goes_through_the_next_token():
    own = type(llama()).forward
    name = next(each for each in CACHE_NAMES if each in inspect.signature(own).parameters)
    other = next(each for each in CACHE_NAMES if each not in inspect.signature(own).parameters)
    body = f"""
def forward(self, input_ids=None, attention_mask=None, {other}=None, use_cache=None, logits_to_keep=0):
    return own(self, input_ids=input_ids, attention_mask=attention_mask, {name}={other}, use_cache=use_cache,
               logits_to_keep=logits_to_keep)
"""
    defined = {"own": own}
    exec(body, defined)
    workload = Workload(batch_size=2, num_tokens=12, new_tokens=5)
    assert memory_terms(llama(defined["forward"]), workload) == memory_terms(llama(), workload)


class Sealed:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


def test_cache_without_a_byte_that_can_be_seen_is_estimated_and_the_estimate_says_why():
    own = type(llama()).forward

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, memory=None, logits_to_keep=0):
        return Renamed(logits=own(self, input_ids=input_ids, attention_mask=attention_mask).logits, memory=Sealed(1))

    terms = memory_terms(llama(forward), Workload(batch_size=2, num_tokens=12))
    assert terms.kv_cache == memory_terms(llama(), Workload(batch_size=2, num_tokens=12)).kv_cache
    assert terms.source["kv_cache"] == (
        "configuration: LlamaForCausalLM: found a Sealed without a byte under 'memory' · expected tensors in its "
        "attributes · plan with use_cache=False and leave room for the cache in max_memory"
    )


def test_attention_that_holds_its_scores_counts_them():
    length, peaks = 256, {}
    for kind in ("sdpa", "eager"):
        config = AutoConfig.for_model("llama", **{**SMALL, "num_key_value_heads": 2}, attn_implementation=kind)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
        peaks[kind] = memory_terms(model, Workload(num_tokens=length)).activations
    assert peaks["eager"] - peaks["sdpa"] > 4 * length * length * 4  # heads × tokens × tokens, float32
    assert peaks["sdpa"] < 4 * length * length * 4


def test_terms_of_a_model_that_cannot_be_traced_are_bounds_from_its_configuration():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1]))
    workload = Workload(batch_size=2, num_tokens=24, new_tokens=8)
    traced = memory_terms(model, workload)

    def ask(*, hidden_states, **_):
        return hidden_states if hidden_states.sum().item() else -hidden_states

    model.model.layers[0].forward = lambda hidden_states, **_: ask(hidden_states=hidden_states)
    told = memory_terms(model, workload)
    assert told.source["kv_cache"].startswith("configuration: LlamaForCausalLM, module 'model.layers.0'")
    assert told.kv_cache == traced.kv_cache
    assert told.logits == traced.logits
    assert told.activations >= traced.activations


def test_cache_after_generation_counts_new_tokens_and_heeds_its_dtype():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1]))
    each = 2 * 2 * 2 * 8 * 4  # keys and values, batch, heads, width, float32
    terms = memory_terms(model, Workload(batch_size=2, num_tokens=24, new_tokens=8))
    assert set(terms.kv_cache.values()) == {each * 32}
    halved = memory_terms(model, Workload(batch_size=2, num_tokens=24, new_tokens=8, kv_dtype="bfloat16"))
    assert set(halved.kv_cache.values()) == {each * 32 // 2}
    assert terms.logits < 2 * 24 * 99 * 4  # generation keeps the last token's only
    none = memory_terms(model, Workload(batch_size=2, num_tokens=24, use_cache=False))
    assert not sum(none.kv_cache.values())


def test_cache_belongs_to_the_layer_that_fills_it():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1]))
    owners = memory_terms(model, Workload(num_tokens=8)).kv_cache
    assert {".".join(owner.split(".")[:3]) for owner in owners} == {f"model.layers.{layer}" for layer in range(4)}


def test_encoder_decoder_counts_both_caches():
    config = AutoConfig.for_model(
        "t5", vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    ids = torch.randint(10, 99, (2, 24))
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    terms = memory_terms(model, Workload(batch_size=2, num_tokens=24))
    assert sum(terms.kv_cache.values()) == cache_bytes(out.past_key_values) > 0


def test_terms_on_meta_are_those_of_the_real_model():
    config = AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1])
    real = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    workload = Workload(batch_size=2, num_tokens=16)
    assert memory_terms(empty, workload) == memory_terms(real, workload)


def test_order_is_that_of_calls():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODERS["llama, grouped queries"][1]))
    order = call_order(model)
    places = [order.index(name) for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head")]
    assert places == sorted(places)  # the rotary embedding is registered last in the body


REFUSED = {
    "kosmos2": "found a forward that cannot run",  # where its image stands among the text
    "lxmert": "visual_feats",  # as many regions as somebody found in a picture
    "moonshine": "input 'input_values': found no rule",  # its encoder's strides are in its code
    "pix2struct": "input 'flattened_patches': found no rule",  # as many as its processor cuts
    "vits": "DataDependentOutputException",  # it asks whether durations are within bounds
}
# what a codec, a masked model with any `inputs`, a decoder of spectra and so on are given
GIVEN = ("perceiver", "bart-classifier", "speecht5", "encodec", "dac", "mimi", "clap", "instructblip", "layoutlmv3",
    "speech_encoder_decoder", "musicgen", "switch_transformers", "nllb_moe", *REFUSED)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, id=each.name, marks=() if each.name in GIVEN else pytest.mark.full) for each in AVAILABLE],
)
def test_order_and_terms_of_any_architecture_are_traced_or_refused_by_name(architecture):
    model, kept = architecture.build(), Workload(batch_size=2, num_tokens=8, use_cache=False)
    if architecture.name in REFUSED:
        reason = f"{architecture.model_class}.*{REFUSED[architecture.name]}"
        with pytest.raises(PlanError, match=reason):
            call_order(model)
        with pytest.raises(PlanError, match=reason):  # or told from the configuration, and why
            raise PlanError(memory_terms(model, kept).source["activations"])
        return
    order, called = call_order(model), {}
    assert memory_terms(model, kept).source["activations"] == "traced"
    generating = Workload(batch_size=2, num_tokens=8, new_tokens=3)
    if model.can_generate() and architecture.name != "recurrent_gemma":
        assert memory_terms(model, generating).source["kv_cache"] == "traced"
    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
    with torch.no_grad():
        architecture.run(model)
    assert [name for name in order if name in called] == [name for name in called if name in order]


def test_a_model_without_known_inputs_is_refused_by_name():
    class Odd(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig
        main_input_name = "smells"

        def forward(self, smells):
            return smells

    with pytest.raises(PlanError, match="smells"):
        call_order(Odd(transformers.LlamaConfig(**SMALL)))
