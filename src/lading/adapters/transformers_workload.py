"""Measure what a transformers model needs beside its weights: cache, logits, activations; and the order of its calls.

Knows what goes into a transformers model, what comes out, and what generation keeps. The numbers are traced: a batch
with padding crosses a weightless copy of the model, then, where tokens are generated, one more token with the cache as
large as it will be. Caches are counted where modules really leave them, so grouped heads, compressed latents, sliding
windows and recurrent states need no formula. Only a model that cannot be traced is estimated from its configuration.

Images have the configured size, else 224 pixels a side; generating models that also see or hear get text alone. A model
whose configuration does not tell the size of an input that it needs is refused: how many regions a picture has, how
many samples a token of speech.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lading.adapters.transformers_caches import CACHE_NAMES, as_arguments, caches_in, is_recurrent, tensors_in
from lading.errors import PlanError, name_list, refusal
from lading.placement.trace import Allocation, Trace, Tracer, tracing
from lading.placement.workload import MemoryTerms, Workload

_LAYER = re.compile(r".*?\.\d+(?=\.|$)")
"""The name of a layer, at the head of the names inside it."""


def call_order(model: Any) -> tuple[str, ...]:
    """Return the names of a model's modules in the order in which a forward first calls them; '' is the model.

    Raises:
        PlanError: the forward cannot be traced, or it takes an input that is not known here.
    """
    with tracing(model) as tracer:
        return tracer.forward(**_accepted(model, {**_inputs(model, 1, 8, 8), "use_cache": False})).call_order


def memory_terms(model: Any, workload: Workload) -> MemoryTerms:
    """Measure what a workload needs beside the weights; the cache at ``num_tokens + new_tokens`` tokens.

    Args:
        model: a transformers model; its parameters and buffers may be on meta.
        workload: the largest call. Where the main input is no text, its tokens are the decoder's.

    Raises:
        PlanError: it can neither be traced nor told from the configuration.
    """
    if not workload.num_tokens:
        return MemoryTerms(kv_cache={}, logits=0, activations=0, source={})
    try:
        return _traced(model, workload)
    except PlanError as error:
        return _from_configuration(model, workload, error)


@dataclass(frozen=True, slots=True)
class _Phase:
    """One forward: its trace without the output, the cache before it and after it, its logits, generation's copy."""

    trace: Trace
    old: Mapping[Allocation, torch.dtype]
    cache: Mapping[Allocation, torch.dtype]
    logits: Mapping[Allocation, torch.dtype]
    copied_bytes: int

    @property
    def logits_bytes(self) -> int:
        return sum(allocation.num_bytes for allocation in self.logits)

    def cache_bytes(self, dtype: torch.dtype | str | None = None) -> Counter[str]:
        """Count the cache by the layer that owns it, floats as if they had the given type."""
        sizes: Counter[str] = Counter()
        for allocation, held in self.cache.items():
            kept = dtype if isinstance(dtype, torch.dtype) and held.is_floating_point else held
            layer = _LAYER.match(allocation.owner)
            sizes[layer[0] if layer else allocation.owner] += allocation.num_bytes * kept.itemsize // held.itemsize
        return sizes


def _traced(model: Any, workload: Workload) -> MemoryTerms:
    has_text = model.main_input_name == "input_ids"
    rows, num_tokens, new_tokens = workload.batch_size, workload.num_tokens, workload.new_tokens
    prompt = 1 if new_tokens and model.config.is_encoder_decoder and has_text else num_tokens  # what is continued
    with tracing(model) as tracer:
        is_cached = _keeps_cache(model, workload, tracer)
        options = {"use_cache": is_cached, **({"logits_to_keep": 1} if new_tokens else {})}
        encoded = _encoded(tracer.module) if is_cached and new_tokens else {}

        def prefill(length: int) -> Trace:
            source = num_tokens if model.config.is_encoder_decoder else length
            return _forward(tracer, {**_inputs(model, rows, source, length), **options}, is_cached)

        phases = [_phase(tracer, prefill(prompt if is_cached else prompt + new_tokens), new_tokens)]
        if is_cached and new_tokens:
            output = prefill(prompt + new_tokens - 1).output
            step = _next_token(model, output, rows, num_tokens, prompt + new_tokens) | encoded
            old = tracer.allocations(tensors_in(caches_in(output)))
            del output
            phases.append(_phase(tracer, _forward(tracer, {**step, **options}, is_cached), new_tokens, old))
            del step
    kept, held = Counter[str](), Counter[str]()
    for phase in phases:
        kept |= phase.cache_bytes(workload.kv_dtype)
        held |= phase.cache_bytes()
    return MemoryTerms(
        kv_cache=dict(kept),
        logits=max(phase.logits_bytes + phase.copied_bytes for phase in phases),
        activations=max(
            phase.trace.peak_bytes(({**phase.old, **phase.cache}, held.total()), (phase.logits, phase.logits_bytes))
            for phase in phases
        ),
        source=dict.fromkeys(("kv_cache", "logits", "activations"), "traced"),
    )


def _encoded(model: Any) -> dict[str, Any]:
    """Keep the latest output of an encoder as the argument with which generation gives it to the decoder again."""
    kept: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        model.get_encoder().register_forward_hook(lambda *call: kept.update(encoder_outputs=call[-1]))
    return kept


def _forward(tracer: Tracer, inputs: dict[str, Any], is_cached: bool) -> Trace:
    """Run a forward; where it keeps no cache unless generation made one, with that."""
    trace = tracer.forward(**_accepted(tracer.module, inputs))
    if is_cached and not caches_in(trace.output):
        model: Any = tracer.module
        made: dict[str, Any] = model.prepare_inputs_for_generation(**inputs)
        trace = tracer.forward(**_accepted(model, made))
        if not caches_in(trace.output):
            raise _no_cache(model, "no cache in what its forward gives", f"one under {' or '.join(CACHE_NAMES)}")
    return trace


def _no_cache(model: Any, found: str, expected: str) -> PlanError:
    return PlanError(
        refusal(
            type(model).__name__,
            found=found,
            expected=expected,
            way_out="plan with use_cache=False and leave room for the cache in max_memory",
        )
    )


def _phase(
    tracer: Tracer, trace: Trace, new_tokens: int, old: Mapping[Allocation, torch.dtype] | None = None
) -> _Phase:
    scores = list(tensors_in(_given(trace.output, "logits")))[:1]
    caches = caches_in(trace.output)
    cache = tracer.allocations(tensors_in(caches))
    if caches and not sum(allocation.num_bytes for allocation in cache):
        found = " and ".join(f"a {type(each).__name__} without a byte under {name!r}" for name, each in caches.items())
        raise _no_cache(tracer.module, found, "tensors in its attributes")
    return _Phase(
        trace=replace(trace, output=None),
        old=old or {},
        cache=cache,
        logits=tracer.allocations(scores),
        copied_bytes=sum(score[:, -1].numel() * 4 for score in scores) if new_tokens else 0,
    )


def _keeps_cache(model: Any, workload: Workload, tracer: Tracer | None = None) -> bool:
    """Say whether forwards keep a cache: they take one and are told to, else a short one gives one.

    Without a tracer whatever is wanted counts as kept: that is an estimate from above.
    """
    wanted = model.can_generate() if workload.use_cache is None else workload.use_cache
    if not wanted:
        return False
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    is_told = any("use_cache" in inspect.signature(part.forward).parameters for part in models)
    if is_told and any(name in inspect.signature(model.forward).parameters for name in CACHE_NAMES):
        return True
    inputs = {**_inputs(model, 1, 8, 8), "use_cache": True}
    return tracer is None or bool(caches_in(tracer.forward(**_accepted(model, inputs)).output))


def _accepted(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def _given(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else None


def _settings(config: Any) -> Iterator[Any]:
    yield config
    yield from (part for part in vars(config).values() if isinstance(part, PretrainedConfig))


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of these settings that the configuration or a part of it has."""
    found = (getattr(part, name, None) for name in names for part in _settings(config))
    return next((value for value in found if value is not None), default)


def _inputs(model: Any, rows: int, num_tokens: int, decoder_tokens: int) -> dict[str, torch.Tensor]:
    """Make one batch, the last row padded where there are several."""
    known = inspect.signature(model.forward).parameters
    config, main = model.config, _main_input(model, known)
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids" or ("input_ids" in known and not config.is_encoder_decoder):
        inputs["input_ids"], mask = _ids(config, rows, num_tokens), torch.ones(rows, num_tokens, dtype=torch.long)
        mask[1:, 0] = 0
        inputs["attention_mask"] = mask
        end = _setting(config, "eos_token_id")
        if config.is_encoder_decoder and not model.can_generate() and isinstance(end, int):
            inputs["input_ids"][:, -1] = end  # where a classifier of sequences reads
    texts = (name for name, each in known.items() if name.endswith("_input_ids") and each.default is each.empty)
    inputs.update((name, _ids(config, rows, num_tokens)) for name in texts)  # a second text, of a Q-Former
    for name in [main, *(() if model.can_generate() else ("pixel_values", "input_features"))]:
        if name not in inputs and name in known:
            inputs[name] = _signal(model, name, rows, num_tokens)
    if config.is_encoder_decoder:
        inputs.update(_decoder_inputs(model, rows, decoder_tokens))
    return inputs


def _main_input(model: Any, known: Collection[str]) -> str:
    """Name the main input; where that is ``inputs``, which may be anything, by what it stands for."""
    main: str = model.main_input_name
    if main != "inputs":
        return main
    encoder = getattr(model.get_encoder(), "main_input_name", "") if model.config.is_encoder_decoder else ""
    names = (name for name in (encoder, "input_ids", "pixel_values", "input_values", "input_features") if name in known)
    return next(names, main)


def _decoder_inputs(model: Any, rows: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Make what the decoder of an encoder-decoder continues: spectra, or ids, a row for each codebook."""
    if "decoder_input_values" in inspect.signature(model.forward).parameters:
        bins = _setting(model.config, "num_mel_bins")
        return {"decoder_input_values": torch.zeros(rows, num_tokens, bins, dtype=model.dtype)}
    rows *= _setting(model.config, "num_codebooks", default=1)
    return {"decoder_input_ids": _ids(model.config, rows, num_tokens)}


def _ids(config: Any, rows: int, num_tokens: int) -> torch.Tensor:
    """Make token ids that mean nothing special: no padding, no image."""
    settings = {key: value for part in _settings(config) for key, value in vars(part).items() if "token_i" in key}
    plain = next(token for token in range(len(settings) + 1) if token not in settings.values())
    return torch.full((rows, num_tokens), plain, dtype=torch.long)


def _signal(model: Any, name: str, rows: int, num_tokens: int) -> torch.Tensor:
    """Make pixels, spectra or a waveform.

    Raises:
        PlanError: the configuration does not tell their size.
    """
    config, has = model.config, vars(model.config).__contains__
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    frames, ratio, shape = _setting(config, "max_source_positions"), _setting(config, "inputs_to_logits_ratio"), None
    if name == "pixel_values":
        side = _setting(config, "image_size", "input_size", default=224)
        frames = [config.num_frames] if has("num_frames") else []  # a video
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        shape = [rows, *frames, _setting(config, "num_channels", default=3), *sides]
    elif name == "input_features" and bins and (side := _setting(config, "spec_size")):  # cut into squares
        shape = [rows, 1, side * (side // bins), bins]
    elif name == "input_features" and bins:
        shape = [rows, bins, 2 * frames] if has("num_mel_bins") and frames else [rows, num_tokens, bins]
    elif name == "input_values" and has("num_mel_bins"):
        shape = [rows, config.max_length, bins]
    elif name == "input_values" and ratio:
        shape = [rows, num_tokens * ratio]
    elif name == "input_values" and has("upsampling_ratios"):  # a codec
        shape = [rows, getattr(config, "audio_channels", 1), num_tokens * math.prod(config.upsampling_ratios)]
    if shape is None:
        raise PlanError(
            refusal(
                f"{type(model).__name__}, input {name!r}",
                found="no rule for its shape",
                expected="token ids, pixels, spectra or a waveform whose size the configuration tells",
                way_out="plan without a workload, in the modules' own order",
            )
        )
    return torch.zeros(shape, dtype=model.dtype)


def _next_token(model: Any, output: Any, rows: int, num_tokens: int, length: int) -> dict[str, Any]:
    """Make the inputs of the step that brings the decoder to ``length`` tokens."""
    is_seq2seq, found = model.config.is_encoder_decoder, caches_in(output)
    caches = as_arguments(found, inspect.signature(model.forward).parameters)
    if caches is None:
        raise _no_cache(model, f"a cache under {name_list(found)}", "a forward that takes what it gives")
    mask = torch.ones(rows, num_tokens if is_seq2seq else length, dtype=torch.long)
    mask[1:, 0] = 0
    step = {
        **(_decoder_inputs(model, rows, 1) if is_seq2seq else {"input_ids": _ids(model.config, rows, 1)}),
        "cache_position": torch.arange(length - 1, length),
        **caches,
    }
    if model.main_input_name == "input_ids" and not any(is_recurrent(*each) for each in found.items()):
        step["attention_mask"] = mask
    return step


def _from_configuration(model: Any, workload: Workload, reason: PlanError) -> MemoryTerms:
    """Estimate a decoder of attention layers that cannot be traced, from above.

    Raises:
        PlanError: the configuration does not tell, as for recurrent layers.
    """
    config = model.config.get_text_config(decoder=True)
    layers, heads, hidden, vocabulary = (
        getattr(config, name, None)
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * (layers or 0)
    stack = (name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers)
    name, is_attention = next(stack, None), {"full_attention", "sliding_attention"}.issuperset(kinds)
    if (
        model.config.is_encoder_decoder
        or name is None
        or not (heads and hidden and vocabulary and is_attention)
        or not model.can_generate()
    ):
        raise reason
    rows, length, size = workload.batch_size, workload.num_tokens + workload.new_tokens, model.dtype.itemsize
    width = getattr(config, "head_dim", None) or hidden // heads
    row_width = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width
    if getattr(config, "kv_lora_rank", None):  # cached per head, or less: as the latent
        row_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    window = {
        "sliding_attention": max(workload.num_tokens, min(length, getattr(config, "sliding_window", 0) or length))
    }
    kv_size = workload.kv_dtype.itemsize if isinstance(workload.kv_dtype, torch.dtype) else size
    is_cached, known = _keeps_cache(model, workload), inspect.signature(model.forward).parameters
    tokens = rows * (workload.num_tokens if is_cached else length)
    scored = rows if workload.new_tokens and "logits_to_keep" in known else tokens
    experts = (getattr(config, "num_experts_per_tok", 0) or 0) + (getattr(config, "n_shared_experts", 0) or 0)
    inner = max(getattr(config, "intermediate_size", 0), experts * (getattr(config, "moe_intermediate_size", 0) or 0))
    scores = heads * (2 * size + 4) if config._attn_implementation == "eager" else 1 + size
    return MemoryTerms(
        kv_cache={
            f"{name}.{index}": rows * window.get(kind, length) * row_width * kv_size for index, kind in enumerate(kinds)
        }
        if is_cached
        else {},
        logits=scored * vocabulary * size + (rows * vocabulary * 4 if workload.new_tokens else 0),
        activations=tokens * size * (4 * hidden + 3 * inner + 2 * row_width + 4 * heads * width)
        + tokens * tokens // rows * scores,
        source=dict.fromkeys(("kv_cache", "logits", "activations"), f"configuration: {reason}"),
    )
