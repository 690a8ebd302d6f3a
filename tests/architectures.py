"""List tiny transformers models, one of every kind, that loading is proven on.

Each entry is a class, a configuration of a few layers, and inputs. The table knows nothing of lading: it is built,
filled with random numbers and saved with transformers alone. What it guarantees: the same seeds give the same weights
and inputs in every process; every float that a checkpoint holds differs from what the class would initialise it to, so
a tensor that was never loaded cannot pass for one that was; outputs hold no NaN.

Every batch has two rows. Of the 99 token ids those below 10 are left to the special tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers

Config = dict[str, Any]
Inputs = dict[str, Any]

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
MAJOR = RELEASE[0]
PUBLIC = frozenset(dir(transformers))  # takes 0.2 s, so once
VOCABULARY = 99
FAMILIES = (
    "encoder",
    "decoder",
    "encoder-decoder",
    "vision",
    "audio",
    "multimodal",
    "composite",
    "moe",
    "state-space",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Say how to build one tiny model and how to call it."""

    name: str  # the test's id: model_type, and a suffix where a type stands twice
    family: str  # one of FAMILIES
    model_class: str  # the concrete class's name in transformers
    config: Config  # keyword arguments of its configuration; sub-configurations are nested dicts
    inputs: Callable[[], Inputs]  # deterministic keyword arguments of forward
    odd: str = ""  # what a loader must honour here and could miss; empty: nothing known
    majors: tuple[int, ...] = (4, 5)  # versions of transformers that this entry stands in
    since: tuple[int, int] = (0, 0)  # the release in which transformers itself reads what it writes of this model
    forward: str = "__call__"  # the method that is called; some models have no plain forward
    prepare: Callable[[torch.nn.Module], None] | None = (
        None  # changes the built model before it is filled; None: nothing
    )
    overwritten: tuple[str, ...] = ()  # stored tensors that from_pretrained itself overwrites after reading them
    trains: bool = True  # False: no gradient reaches the weights from these outputs

    def __post_init__(self) -> None:
        assert self.family in FAMILIES, self.family

    @property
    def is_available(self) -> bool:
        """Whether the installed transformers has the class; nothing is imported to find out."""
        return MAJOR in self.majors and self.since <= RELEASE and self.model_class in PUBLIC

    def resolve(self) -> type[transformers.PreTrainedModel]:
        """Return the class."""
        return getattr(transformers, self.model_class)

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """Return the model in evaluation mode, float32, every tensor that a checkpoint holds random."""
        model_class = self.resolve()
        transformers.set_seed(seed)
        model = model_class(
            model_class.config_class(**copy.deepcopy(self.config))
        )  # composite ones pop from their dicts
        if self.prepare is not None:
            self.prepare(model)
        randomise(model, seed)
        if model.can_generate():
            model.generation_config.max_new_tokens = 7
        return model.eval()

    def run(self, model: torch.nn.Module) -> Any:
        """Return the outputs of one call on this entry's inputs; the seed is set for models that sample."""
        transformers.set_seed(0)
        method = model if self.forward == "__call__" else getattr(model, self.forward)
        return method(**self.inputs())


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter and persistent buffer away from its initial value, keeping it in its valid range.

    Floats get noise of 0.05 on top (zeros and ones become telling, a decay stays a decay), integers that count are
    drawn anew, integers that index and booleans stay, and so does what the class computes and never saves.
    """
    generator = torch.Generator().manual_seed(seed)
    computed = re.compile("|".join(getattr(model, "_keys_to_ignore_on_save", None) or ["$^"]))
    stored = {name for name in model.state_dict() if not computed.search(name)}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.05
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
            elif name in stored and name.endswith("num_batches_tracked"):
                tensor.copy_(torch.randint(1, 1000, (), generator=generator))


# -- inputs, all from seeded generators


def ids(length: int = 9, *, seed: int = 1, low: int = 10, high: int = VOCABULARY) -> torch.Tensor:
    """Return token ids [2, length] in [low, high)."""
    return torch.randint(low, high, (2, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 2) -> torch.Tensor:
    """Return normal numbers of the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = 9) -> Inputs:
    """Return token ids and a mask whose second row is padded."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": ids(length), "attention_mask": mask}


def bare_tokens(length: int = 9) -> Inputs:
    """Return token ids alone, for models without an attention mask."""
    return {"input_ids": ids(length)}


def pairs(length: int = 9) -> Inputs:
    """Return an encoder's tokens and a decoder's."""
    return {**tokens(length), "decoder_input_ids": ids(5, seed=3)}


def images(size: int = 32, channels: int = 3) -> Inputs:
    """Return pixels [2, channels, size, size]."""
    return {"pixel_values": floats(2, channels, size, size)}


def sounds(samples: int = 640) -> Inputs:
    """Return a waveform [2, samples]."""
    return {"input_values": floats(2, samples)}


def with_image_tokens(count: int, image_token: int = 5, **more: Any) -> Inputs:
    """Return tokens with `count` places for an image, and its pixels unless `more` brings them."""
    inputs = {**tokens(count + 6), **(more or images())}
    inputs["input_ids"][:, 1 : count + 1] = image_token
    return inputs


def with_image_grids() -> Inputs:
    """Return what Qwen's vision models take: 16 patches of 4×4 pixels and 2 frames per image, merged to 4 tokens."""
    inputs = with_image_tokens(4, pixel_values=floats(32, 96), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]))
    if MAJOR >= 5:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).long()
    return inputs


# -- configurations that many entries share

BERT: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_8: Config = {**LLAMA, "head_dim": 8}
BART: Config = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: Config = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
VIT: Config = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
WAV2VEC2: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2,
}
GPT: Config = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
XLM: Config = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
OPT_TEXT: Config = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}
BERT_DECODER: Config = {**BERT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True}
SWIN: Config = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
CODEC: Config = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 32}
CLIP_TEXT: Config = {**BERT, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
CLIP_VISION: Config = {**VIT, "projection_dim": 16}
CLIP: Config = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION}
LLAMA_TEXT: Config = {**LLAMA, "model_type": "llama"}
CLIP_TOWER: Config = {**VIT, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP_TOWER: Config = {**VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
QFORMER: Config = {**BERT, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
BLIP_2: Config = {
    "vision_config": VIT,
    "qformer_config": QFORMER,
    "text_config": OPT_TEXT,
    "num_query_tokens": 4,
    "image_token_index": 5,
    "image_token_id": 5,
}
QWEN_TOKENS: Config = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
QWEN_PATCHES: Config = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE: Config = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: Config = {
    **LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SPECIAL: Config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    **SPECIAL,
}
MAMBA_2_PART: Config = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
WIDE_HEADS: Config = {"attention_hidden_size": 64, "attention_head_dim": 16}


def entry(
    name: str, family: str, model_class: str, config: Config, inputs: Callable[[], Inputs], **rest: Any
) -> Architecture:
    """Return one row of the table."""
    return Architecture(name=name, family=family, model_class=model_class, config=config, inputs=inputs, **rest)


# The table is laid out by hand: one key a line would make it two thousand lines.
# fmt: off

ENCODERS = [
    entry("bert", "encoder", "BertForMaskedLM", BERT, tokens, odd="tied decoder and its bias"),
    entry("bert-classifier", "encoder", "BertForSequenceClassification", {**BERT, "num_labels": 3}, tokens),
    entry("roberta", "encoder", "RobertaForMaskedLM", BERT, tokens),
    entry("xlm_roberta", "encoder", "XLMRobertaForTokenClassification", BERT, tokens),
    entry("camembert", "encoder", "CamembertForMaskedLM", BERT, tokens),
    entry("albert", "encoder", "AlbertForMaskedLM", {**BERT, "embedding_size": 16}, tokens, odd="one layer used twice"),
    entry("distilbert", "encoder", "DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48,
        "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}, tokens),
    entry("electra", "encoder", "ElectraForPreTraining", {**BERT, "embedding_size": 16}, tokens),
    entry("deberta", "encoder", "DebertaForMaskedLM", {**BERT, "relative_attention": True, "pos_att_type": ["c2p",
        "p2c"]}, tokens),
    entry("deberta_v2", "encoder", "DebertaV2ForMaskedLM", {**BERT, "relative_attention": True, "pos_att_type": ["c2p",
        "p2c"], "position_buckets": 8}, tokens),
    entry("modernbert", "encoder", "ModernBertForMaskedLM", {**BERT, "cls_token_id": 1, "sep_token_id": 2,
        "bos_token_id": 1, "eos_token_id": 2}, tokens),
    entry("mpnet", "encoder", "MPNetForMaskedLM", BERT, tokens),
    entry("ernie", "encoder", "ErnieForMaskedLM", BERT, tokens),
    entry("rembert", "encoder", "RemBertForMaskedLM", {**BERT, "input_embedding_size": 16, "output_embedding_size": 16},
        tokens),
    entry("roformer", "encoder", "RoFormerForMaskedLM", {**BERT, "embedding_size": 32}, tokens,
        odd="sinusoidal position parameters, frozen"),
    entry("convbert", "encoder", "ConvBertForMaskedLM", {**BERT, "embedding_size": 16, "conv_kernel_size": 3}, tokens),
    entry("nystromformer", "encoder", "NystromformerForMaskedLM", {**BERT, "num_landmarks": 8,
        "segment_means_seq_len": 8}, lambda: tokens(8)),
    entry("fnet", "encoder", "FNetForMaskedLM", BERT, bare_tokens),
    entry("esm", "encoder", "EsmForMaskedLM", {**BERT, "mask_token_id": 3, "position_embedding_type": "rotary"},
        tokens),
    entry("layoutlm", "encoder", "LayoutLMForMaskedLM", BERT, tokens),
    entry("megatron_bert", "encoder", "MegatronBertForMaskedLM", BERT, tokens),
    entry("data2vec_text", "encoder", "Data2VecTextForMaskedLM", BERT, tokens),
    entry("ibert", "encoder", "IBertForMaskedLM", BERT, tokens, odd="integer buffers beside quantised layers"),
    entry("mobilebert", "encoder", "MobileBertForMaskedLM", {**BERT, "embedding_size": 16, "intra_bottleneck_size": 16},
        tokens, odd="tied by concatenation"),
    entry("squeezebert", "encoder", "SqueezeBertForMaskedLM", {**BERT, "embedding_size": 32}, tokens),
    entry("xlnet", "encoder", "XLNetLMHeadModel", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4,
        "d_inner": 48}, tokens),
    entry("flaubert", "encoder", "FlaubertWithLMHeadModel", XLM, tokens),
    entry("funnel", "encoder", "FunnelForMaskedLM", {"vocab_size": VOCABULARY, "block_sizes": [1, 1],
        "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}, tokens),
    entry("longformer", "encoder", "LongformerForMaskedLM", {**BERT, "attention_window": 4}, lambda: tokens(8)),
    entry("big_bird", "encoder", "BigBirdForMaskedLM", {**BERT, "attention_type": "original_full"}, tokens),
    entry("canine", "encoder", "CanineModel", {**BERT, "downsampling_rate": 4, "num_hash_functions": 2,
        "num_hash_buckets": 16, "local_transformer_stride": 8, "upsampling_kernel_size": 4}, lambda: tokens(16)),
    entry("perceiver", "encoder", "PerceiverForMaskedLM", {"vocab_size": VOCABULARY, "num_latents": 4, "d_latents": 32,
        "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4, "max_position_embeddings": 16, "qk_channels": 32, "v_channels": 32},
        lambda: {"inputs": ids(16)}),
    entry("tapas", "encoder", "TapasForMaskedLM", {**BERT, "type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4]}, tokens,
        odd="no assignment in v4"),
    entry("lxmert", "encoder", "LxmertModel", {**BERT, "l_layers": 1, "x_layers": 1, "r_layers": 1,
        "visual_feat_dim": 16}, lambda: {**tokens(), "visual_feats": floats(2, 4, 16), "visual_pos": floats(2, 4, 4)},
        odd="no assignment in v4"),
    entry("eurobert", "encoder", "EuroBertForMaskedLM", LLAMA, tokens),
    entry("nomic_bert", "encoder", "NomicBertForMaskedLM", BERT, tokens),
]

DECODERS = [
    entry("llama", "decoder", "LlamaForCausalLM", LLAMA, tokens),
    entry("llama-tied", "decoder", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, tokens),
    entry("qwen2", "decoder", "Qwen2ForCausalLM", LLAMA, tokens),
    entry("qwen2-tied", "decoder", "Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}, tokens),
    entry("qwen3", "decoder", "Qwen3ForCausalLM", HEADS_OF_8, tokens),
    entry("gemma", "decoder", "GemmaForCausalLM", HEADS_OF_8, tokens),
    entry("gemma2", "decoder", "Gemma2ForCausalLM", HEADS_OF_8, tokens),
    entry("gemma3_text", "decoder", "Gemma3ForCausalLM", {**HEADS_OF_8, "layer_types": ["sliding_attention",
        "full_attention"]}, tokens, odd="scaled embedding's non-persistent buffer"),
    entry("phi", "decoder", "PhiForCausalLM", LLAMA, tokens),
    entry("phi3", "decoder", "Phi3ForCausalLM", LLAMA, tokens),
    entry("gpt2", "decoder", "GPT2LMHeadModel", {**GPT, "bos_token_id": 1, "eos_token_id": 2}, tokens,
        odd="no assignment in v4; transposed Conv1D"),
    entry("gpt_neo", "decoder", "GPTNeoForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2,
        "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, tokens),
    entry("gpt_neox", "decoder", "GPTNeoXForCausalLM", BERT, tokens),
    entry("gptj", "decoder", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, tokens, odd="no assignment in v4"),
    entry("codegen", "decoder", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, tokens),
    entry("gpt_bigcode", "decoder", "GPTBigCodeForCausalLM", GPT, tokens),
    entry("openai-gpt", "decoder", "OpenAIGPTLMHeadModel", GPT, tokens),
    entry("ctrl", "decoder", "CTRLLMHeadModel", {**GPT, "dff": 48}, tokens,
        odd="position table as plain attribute in v4"),
    entry("xlm", "decoder", "XLMWithLMHeadModel", XLM, tokens),
    entry("opt", "decoder", "OPTForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64}, tokens),
    entry("bloom", "decoder", "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2,
        "n_head": 4}, tokens),
    entry("falcon", "decoder", "FalconForCausalLM", BERT, tokens),
    entry("mpt", "decoder", "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
        "max_seq_len": 64}, tokens),
    entry("mistral", "decoder", "MistralForCausalLM", HEADS_OF_8, tokens),
    entry("olmo", "decoder", "OlmoForCausalLM", LLAMA, tokens),
    entry("olmo2", "decoder", "Olmo2ForCausalLM", LLAMA, tokens),
    entry("stablelm", "decoder", "StableLmForCausalLM", LLAMA, tokens),
    entry("starcoder2", "decoder", "Starcoder2ForCausalLM", LLAMA, tokens),
    entry("granite", "decoder", "GraniteForCausalLM", LLAMA, tokens),
    entry("cohere", "decoder", "CohereForCausalLM", LLAMA, tokens),
    entry("cohere2", "decoder", "Cohere2ForCausalLM", LLAMA, tokens),
    entry("nemotron", "decoder", "NemotronForCausalLM", HEADS_OF_8, tokens),
    entry("glm", "decoder", "GlmForCausalLM", HEADS_OF_8, tokens),
    entry("glm4", "decoder", "Glm4ForCausalLM", HEADS_OF_8, tokens),
    entry("smollm3", "decoder", "SmolLM3ForCausalLM", LLAMA, tokens),
    entry("helium", "decoder", "HeliumForCausalLM", HEADS_OF_8, tokens),
    entry("persimmon", "decoder", "PersimmonForCausalLM", BERT, tokens),
    entry("diffllama", "decoder", "DiffLlamaForCausalLM", LLAMA, tokens),
    entry("exaone4", "decoder", "Exaone4ForCausalLM", LLAMA, tokens),
    entry("xglm", "decoder", "XGLMForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2,
        "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}, tokens),
    entry("biogpt", "decoder", "BioGptForCausalLM", BERT, tokens),
    entry("apertus", "decoder", "ApertusForCausalLM", LLAMA, tokens, odd="activations with parameters and buffers"),
    entry("nanochat", "decoder", "NanoChatForCausalLM", LLAMA, tokens),
    entry("ministral3", "decoder", "Ministral3ForCausalLM", HEADS_OF_8, tokens),
]

SEAMLESS: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48,
    "feature_projection_input_dim": 16,
    "max_position_embeddings": 64,
    "conv_depthwise_kernel_size": 7,
    "t2u_variance_predictor_embed_dim": 32,
    "t2u_variance_predictor_hidden_dim": 16,
    "variance_predictor_kernel_size": 3,
    "t2u_vocab_size": 40,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_attention_heads": 4,
    "t2u_encoder_ffn_dim": 48,
    "t2u_decoder_ffn_dim": 48,
    "char_vocab_size": 20,
    "unit_hifi_gan_vocab_size": 40,
    "unit_embed_dim": 16,
    "lang_embed_dim": 8,
    "spkr_embed_dim": 8,
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "vocoder_num_langs": 4,
    "vocoder_num_spkrs": 4,
}


def part_embeddings(model: torch.nn.Module) -> None:
    """Give the encoder and the decoder embeddings of their own: the class lets them share one, ties or no ties."""
    for part in (model.text_encoder, model.text_decoder):
        part.embed_tokens.weight = torch.nn.Parameter(part.embed_tokens.weight.detach().clone())


ENCODER_DECODERS = [
    entry("t5", "encoder-decoder", "T5ForConditionalGeneration", T5, pairs, odd="wo stays float32"),
    entry("t5-untied", "encoder-decoder", "T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False,
        "feed_forward_proj": "gated-gelu"}, pairs, odd="wo stays float32"),
    entry("t5-encoder", "encoder-decoder", "T5EncoderModel", T5, tokens, odd="wo stays float32"),
    entry("mt5", "encoder-decoder", "MT5ForConditionalGeneration", T5, pairs, odd="wo stays float32"),
    entry("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", T5, pairs, odd="wo stays float32"),
    entry("longt5", "encoder-decoder", "LongT5ForConditionalGeneration", {**T5, "local_radius": 4}, pairs),
    entry("bart", "encoder-decoder", "BartForConditionalGeneration", BART, pairs,
        odd="final_logits_bias buffer of zeros"),
    entry("bart-classifier", "encoder-decoder", "BartForSequenceClassification", BART,
        lambda: {"input_ids": torch.cat([ids(8), torch.full((2, 1), 2)], 1)}),
    entry("mbart", "encoder-decoder", "MBartForConditionalGeneration", BART, pairs),
    entry("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", BART, pairs,
        odd="sinusoidal positions not saved"),
    entry("pegasus_x", "encoder-decoder", "PegasusXForConditionalGeneration", {**BART, "block_size": 4,
        "num_global_tokens": 2}, lambda: pairs(8)),
    entry("marian", "encoder-decoder", "MarianMTModel", {**BART, "pad_token_id": 98}, pairs,
        odd="sinusoidal positions not saved"),
    entry("marian-unshared", "encoder-decoder", "MarianMTModel", {**BART, "pad_token_id": 98,
        "share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCABULARY}, pairs),
    entry("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", BART, pairs,
        odd="position weights as a non-persistent buffer"),
    entry("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", BART, pairs),
    entry("plbart", "encoder-decoder", "PLBartForConditionalGeneration", BART, pairs),
    entry("led", "encoder-decoder", "LEDForConditionalGeneration", {**BART, "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64, "attention_window": 4}, lambda: pairs(8)),
    entry("bigbird_pegasus", "encoder-decoder", "BigBirdPegasusForConditionalGeneration", {**BART,
        "attention_type": "original_full"}, pairs, odd="no assignment in v4"),
    entry("prophetnet", "encoder-decoder", "ProphetNetForConditionalGeneration", {"vocab_size": VOCABULARY,
        "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
        "max_position_embeddings": 64}, pairs),
    entry("fsmt", "encoder-decoder", "FSMTForConditionalGeneration", {**BART, "langs": ["en", "de"],
        "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}, pairs, majors=(5, )),
    entry("seamless_m4t_v2", "encoder-decoder", "SeamlessM4Tv2ForTextToText", SEAMLESS, pairs),
    entry("seamless_m4t_v2-untied", "encoder-decoder", "SeamlessM4Tv2ForTextToText", {**SEAMLESS,
        "tie_word_embeddings": False}, pairs, prepare=part_embeddings,
        odd="three embeddings and a head, all different"),
    entry("seamless_m4t_v2-full", "encoder-decoder", "SeamlessM4Tv2Model", SEAMLESS, pairs,
        odd="weight norm in the vocoder; ties across sub-models"),
    entry("t5gemma", "encoder-decoder", "T5GemmaForConditionalGeneration", {"encoder": HEADS_OF_8,
        "decoder": {**HEADS_OF_8, "cross_attention_hidden_size": 32}, "vocab_size": VOCABULARY}, pairs),
]

CNN: Config = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_channels": 3}

VISION = [
    entry("vit", "vision", "ViTForImageClassification", VIT, images),
    entry("deit", "vision", "DeiTForImageClassificationWithTeacher", VIT, images),
    entry("beit", "vision", "BeitForImageClassification", {**VIT, "use_relative_position_bias": True}, images,
        odd="relative index buffers"),
    entry("dinov2", "vision", "Dinov2Model", VIT, images),
    entry("dinov3_vit", "vision", "DINOv3ViTModel", VIT, images, odd="keys renamed in v5"),
    entry("vit_mae", "vision", "ViTMAEModel", {**VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 16}, images,
        odd="frozen sine-cosine position parameters; samples its mask"),
    entry("swin", "vision", "SwinForImageClassification", SWIN, images),
    entry("swinv2", "vision", "Swinv2ForImageClassification", SWIN, images, odd="computed coordinate tables"),
    entry("convnext", "vision", "ConvNextForImageClassification", {**CNN, "num_stages": 2}, images),
    entry("convnextv2", "vision", "ConvNextV2ForImageClassification", {**CNN, "num_stages": 2}, images,
        odd="parameters made of zeros"),
    entry("resnet", "vision", "ResNetForImageClassification", {**CNN, "embedding_size": 16, "layer_type": "basic"},
        images, odd="BatchNorm's counters"),
    entry("regnet", "vision", "RegNetForImageClassification", {**CNN, "embedding_size": 16, "groups_width": 8}, images),
    entry("bit", "vision", "BitForImageClassification", {**CNN, "embedding_size": 16, "num_groups": 4}, images),
    entry("poolformer", "vision", "PoolFormerForImageClassification", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1,
        1, 1]}, images),
    entry("mobilenet_v2", "vision", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 32,
        "finegrained_output": False}, images),
    entry("mobilevit", "vision", "MobileViTForImageClassification", {"hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2, "image_size": 64}, lambda: images(64)),
    entry("segformer", "vision", "SegformerForSemanticSegmentation", {"num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2],
        "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}, images),
    entry("levit", "vision", "LevitForImageClassificationWithTeacher", {"image_size": 32, "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2]}, images, odd="attention-bias cache, index buffers"),
    entry("cvt", "vision", "CvtForImageClassification", {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1,
        2, 3]}, images),
    entry("pvt", "vision", "PvtForImageClassification", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2],
        "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}, images),
    entry("dpt", "vision", "DPTForSemanticSegmentation", {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1,
        2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "is_hybrid": False}, images),
    entry("yolos", "vision", "YolosForObjectDetection", {**VIT, "image_size": [32, 32], "num_detection_tokens": 4},
        images),
    entry("videomae", "vision", "VideoMAEForVideoClassification", {**VIT, "num_frames": 4, "tubelet_size": 2},
        lambda: {"pixel_values": floats(2, 4, 3, 32, 32)}),
    entry("timesformer", "vision", "TimesformerForVideoClassification", {**VIT, "num_frames": 2},
        lambda: {"pixel_values": floats(2, 2, 3, 32, 32)}),
    entry("vitdet", "vision", "VitDetModel", {**VIT, "pretrain_image_size": 32}, images),
    entry("hiera", "vision", "HieraForImageClassification", {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1],
        "num_heads": [1, 2], "num_query_pool": 1, "query_stride": [2, 2], "masked_unit_size": [4, 4],
        "patch_padding": [3, 3], "patch_stride": [4, 4]}, images),
    entry("detr", "vision", "DetrForObjectDetection", {"use_timm_backbone": False, "use_pretrained_backbone": False,
        "backbone": None, "backbone_config": {"model_type": "resnet", **CNN, "embedding_size": 16,
        "layer_type": "basic", "out_features": ["stage2"]}, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "num_queries": 5}, images, odd="frozen BatchNorm without counters"),
    entry("sam", "vision", "SamModel", {"vision_config": {"hidden_size": 32, "output_channels": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "mlp_dim": 48,
        "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8}, "prompt_encoder_config": {"hidden_size": 16,
        "image_size": 32, "patch_size": 8, "mask_input_channels": 8}, "mask_decoder_config": {"hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_depth": 2, "iou_head_hidden_dim": 16,
        "attention_downsample_rate": 2}}, lambda: {**images(), "input_points": floats(2, 1, 2, 2, seed=4).abs() * 10},
        odd="a persistent random buffer shared by two modules"),
]

AUDIO = [
    entry("whisper", "audio", "WhisperForConditionalGeneration", {**BART, "num_mel_bins": 16,
        "max_source_positions": 20, "max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None},
        lambda: {"input_features": floats(2, 16, 40), "decoder_input_ids": ids(5)},
        odd="sinusoidal position weights are saved and frozen"),
    entry("wav2vec2", "audio", "Wav2Vec2ForCTC", WAV2VEC2, sounds, odd="weight norm as a parametrisation"),
    entry("wav2vec2-pretraining", "audio", "Wav2Vec2ForPreTraining", {**WAV2VEC2, "codevector_dim": 16,
        "proj_codevector_dim": 16, "num_codevectors_per_group": 8}, sounds, odd="weight norm as a parametrisation"),
    entry("wav2vec2-layer-norm", "audio", "Wav2Vec2Model", {**WAV2VEC2, "feat_extract_norm": "layer",
        "do_stable_layer_norm": True}, sounds, odd="weight norm as a parametrisation"),
    entry("hubert", "audio", "HubertForCTC", WAV2VEC2, sounds, odd="weight norm as a parametrisation"),
    entry("wavlm", "audio", "WavLMForCTC", WAV2VEC2, sounds, odd="weight norm as a parametrisation"),
    entry("unispeech_sat", "audio", "UniSpeechSatForCTC", WAV2VEC2, sounds, odd="weight norm as a parametrisation"),
    entry("data2vec_audio", "audio", "Data2VecAudioForCTC", {**WAV2VEC2, "num_conv_pos_embeddings": 3,
        "conv_pos_kernel_size": 3}, sounds),
    entry("sew", "audio", "SEWForCTC", {**WAV2VEC2, "squeeze_factor": 2}, sounds,
        odd="weight norm as a parametrisation"),
    entry("wav2vec2_bert", "audio", "Wav2Vec2BertForCTC", {**BERT, "feature_projection_input_dim": 16,
        "conv_depthwise_kernel_size": 7, "left_max_position_embeddings": 8, "right_max_position_embeddings": 4,
        "mask_time_prob": 0.0}, lambda: {"input_features": floats(2, 12, 16)}),
    entry("wav2vec2_conformer", "audio", "Wav2Vec2ConformerForCTC", {**WAV2VEC2, "conv_depthwise_kernel_size": 7},
        sounds),
    entry("audio_spectrogram_transformer", "audio", "ASTForAudioClassification", {"hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 4, "max_length": 16,
        "num_mel_bins": 16}, lambda: {"input_values": floats(2, 16, 16)}),
    entry("speech_to_text", "audio", "Speech2TextForConditionalGeneration", {**BART, "input_feat_per_channel": 16,
        "input_channels": 1, "conv_channels": 32, "max_source_positions": 64, "max_target_positions": 32},
        lambda: {"input_features": floats(2, 24, 16), "decoder_input_ids": ids(5)},
        odd="sinusoidal positions not saved"),
    entry("speecht5", "audio", "SpeechT5ForTextToSpeech", {"vocab_size": VOCABULARY, "hidden_size": 32,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16, "speech_decoder_prenet_units": 16,
        "speaker_embedding_dim": 8, "speech_decoder_postnet_units": 16, "max_text_positions": 64,
        "speech_decoder_prenet_dropout": 0.0, "reduction_factor": 2}, lambda: {**tokens(),
        "decoder_input_values": floats(2, 5, 16), "speaker_embeddings": floats(2, 8, seed=5)}),
    entry("encodec", "audio", "EncodecModel", {**CODEC, "num_lstm_layers": 1, "target_bandwidths": [24.0],
        "sampling_rate": 24000}, lambda: {"input_values": floats(2, 1, 160)}, odd="weight norm; codebooks are buffers"),
    entry("dac", "audio", "DacModel", {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "downsampling_ratios": [2,
        4], "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 32, "codebook_dim": 4},
        lambda: {"input_values": floats(2, 1, 160)}),
    entry("mimi", "audio", "MimiModel", {**CODEC, "vector_quantization_hidden_dimension": 16, "codebook_dim": 16,
        "num_quantizers": 3, "num_semantic_quantizers": 1, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "upsample_groups": 16, "frame_rate": 1500.0},
        lambda: {"input_values": floats(2, 1, 320)}),
    entry("vits", "audio", "VitsModel", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "ffn_dim": 16, "flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16,
        "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]], "duration_predictor_flow_bins": 4, "duration_predictor_filter_channels": 16,
        "prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 1, "posterior_encoder_num_wavenet_layers": 1,
        "wavenet_dilation_rate": 1, "depth_separable_num_layers": 1, "duration_predictor_num_flows": 2}, tokens,
        odd="weight norm; samples noise"),
    entry("moonshine", "audio", "MoonshineForConditionalGeneration", {"vocab_size": VOCABULARY, "hidden_size": 32,
        "intermediate_size": 48, "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "pad_token_id": 0},
        lambda: {"input_values": floats(2, 2000), "decoder_input_ids": ids(5)}),
    entry("clap", "audio", "ClapModel", {"text_config": {**BERT, "projection_dim": 16},
        "audio_config": {"patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16, "spec_size": 64,
        "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 32,
        "window_size": 4, "projection_dim": 16, "enable_fusion": False}, "projection_dim": 16}, lambda: {**tokens(),
        "input_features": floats(2, 1, 256, 16)}),
]

MULTIMODAL = [
    entry("clip", "multimodal", "CLIPModel", {**CLIP, "projection_dim": 16}, lambda: {**tokens(), **images()},
        odd="scalar parameter logit_scale"),
    entry("clip-vision", "multimodal", "CLIPVisionModelWithProjection", CLIP_VISION, images),
    entry("clip-text", "multimodal", "CLIPTextModel", CLIP_TEXT, tokens),
    entry("siglip", "multimodal", "SiglipModel", {"text_config": {**BERT, "projection_size": 32}, "vision_config": VIT},
        lambda: {**tokens(), **images()}, odd="MultiheadAttention in the pooling head"),
    entry("chinese_clip", "multimodal", "ChineseCLIPModel", {"text_config": BERT, "vision_config": CLIP_VISION,
        "projection_dim": 16}, lambda: {**tokens(), **images()},
        overwritten=("text_model.embeddings.word_embeddings.weight", ) if MAJOR >= 5 else (),
        odd="v5 zeroes the padding row after loading it"),
    entry("clipseg", "multimodal", "CLIPSegForImageSegmentation", {**CLIP, "projection_dim": 16, "extract_layers": [0,
        1], "reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
        "conditional_layer": 0}, lambda: {**tokens(), **images()}),
    entry("owlvit", "multimodal", "OwlViTForObjectDetection", {**CLIP, "projection_dim": 32}, lambda: {**tokens(),
        **images()}),
    entry("blip", "multimodal", "BlipForConditionalGeneration", {"text_config": {**BERT, "projection_dim": 16,
        "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}, "vision_config": CLIP_VISION,
        "projection_dim": 16, "image_text_hidden_size": 16}, lambda: {**tokens(), **images()}),
    entry("blip_2", "multimodal", "Blip2ForConditionalGeneration", BLIP_2, lambda: with_image_tokens(4),
        odd="query tokens (and qformer) stay float32"),
    entry("instructblip", "multimodal", "InstructBlipForConditionalGeneration", BLIP_2, lambda: {**with_image_tokens(4),
        "qformer_input_ids": ids(6, seed=6), "qformer_attention_mask": torch.ones(2, 6, dtype=torch.long)},
        odd="query tokens and qformer stay float32"),
    entry("llava", "multimodal", "LlavaForConditionalGeneration", {"text_config": LLAMA_TEXT,
        "vision_config": CLIP_TOWER, "image_token_index": 5, "image_seq_length": 16}, lambda: with_image_tokens(16),
        odd="saved under the old key names"),
    entry("llava-tied", "multimodal", "LlavaForConditionalGeneration", {"text_config": {**LLAMA_TEXT,
        "tie_word_embeddings": True}, "vision_config": CLIP_TOWER, "image_token_index": 5, "image_seq_length": 16,
        "tie_word_embeddings": True}, lambda: with_image_tokens(16), odd="saved under the old key names, tied"),
    entry("vipllava", "multimodal", "VipLlavaForConditionalGeneration", {"text_config": LLAMA_TEXT,
        "vision_config": CLIP_TOWER, "image_token_index": 5, "image_seq_length": 16, "vision_feature_layers": [-1, -2]},
        lambda: with_image_tokens(16), odd="saved under the old key names"),
    entry("llava_next", "multimodal", "LlavaNextForConditionalGeneration", {"text_config": LLAMA_TEXT,
        "vision_config": CLIP_TOWER, "image_token_index": 5, "image_seq_length": 16, "image_grid_pinpoints": [[32,
        32]]}, tokens, odd="saved under the old key names"),
    entry("paligemma", "multimodal", "PaliGemmaForConditionalGeneration", {"text_config": {**HEADS_OF_8,
        "model_type": "gemma"}, "vision_config": SIGLIP_TOWER, "image_token_index": 5, "projection_dim": 32},
        lambda: with_image_tokens(16), odd="saved under the old key names"),
    entry("gemma3", "multimodal", "Gemma3ForConditionalGeneration", {"text_config": {**HEADS_OF_8,
        "model_type": "gemma3_text"}, "vision_config": SIGLIP_TOWER, "mm_tokens_per_image": 4, "image_token_index": 5,
        "boi_token_index": 6, "eoi_token_index": 7}, lambda: {**with_image_tokens(4),
        "token_type_ids": (with_image_tokens(4)["input_ids"] == 5).long()}, odd="saved under the old key names"),
    entry("aya_vision", "multimodal", "AyaVisionForConditionalGeneration", {"text_config": {**LLAMA,
        "model_type": "cohere2"}, "vision_config": SIGLIP_TOWER, "image_token_index": 5, "downsample_factor": 2,
        "adapter_layer_norm_eps": 1e-6}, lambda: with_image_tokens(4), odd="saved under the old key names"),
    entry("mistral3", "multimodal", "Mistral3ForConditionalGeneration", {"text_config": {**HEADS_OF_8,
        "model_type": "mistral"}, "vision_config": {**VIT, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 5, "spatial_merge_size": 2}, lambda: {**with_image_tokens(4),
        "image_sizes": torch.tensor([[32, 32], [32, 32]])}, odd="saved under the old key names"),
    entry("idefics2", "multimodal", "Idefics2ForConditionalGeneration", {"text_config": {**LLAMA,
        "model_type": "mistral"}, "vision_config": VIT, "perceiver_config": {"hidden_size": 32,
        "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
        "num_key_value_heads": 2}, "image_token_id": 5}, lambda: with_image_tokens(4, pixel_values=floats(2, 1, 3, 32,
        32))),
    entry("idefics3", "multimodal", "Idefics3ForConditionalGeneration", {"text_config": LLAMA_TEXT,
        "vision_config": VIT, "scale_factor": 2, "image_token_id": 5}, lambda: with_image_tokens(4,
        pixel_values=floats(2, 1, 3, 32, 32))),
    entry("qwen2_vl", "multimodal", "Qwen2VLForConditionalGeneration", {"text_config": {**LLAMA,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, **QWEN_PATCHES},
        **QWEN_TOKENS}, with_image_grids, odd="saved under the old key names"),
    entry("qwen2_5_vl", "multimodal", "Qwen2_5_VLForConditionalGeneration", {"text_config": {**LLAMA,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, **QWEN_PATCHES,
        "window_size": 16, "fullatt_block_indexes": [1]}, **QWEN_TOKENS}, with_image_grids,
        odd="saved under the old key names"),
    entry("internvl", "multimodal", "InternVLForConditionalGeneration", {"text_config": {**LLAMA,
        "model_type": "qwen2"}, "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8],
        "model_type": "internvl_vision"}, "image_token_id": 5, "downsample_ratio": 0.5, "image_seq_length": 4},
        lambda: with_image_tokens(4), odd="saved under the old key names"),
    entry("deepseek_vl", "multimodal", "DeepseekVLForConditionalGeneration", {"text_config": LLAMA_TEXT,
        "vision_config": SIGLIP_TOWER, "image_token_id": 5}, lambda: with_image_tokens(16), odd="no assignment in v4"),
    entry("emu3", "multimodal", "Emu3ForConditionalGeneration", {"text_config": {**LLAMA, "model_type":
        "emu3_text_model"}, "vq_config": {"embed_dim": 8, "codebook_size": 8, "latent_channels": 8, "base_channels": 32,
        "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32}, "vocabulary_map":
        {"<image>": 5}}, tokens, odd="no assignment in v4"),
    entry("fuyu", "multimodal", "FuyuForCausalLM", {**BERT, "text_config": {**BERT, "model_type": "persimmon"},
        "patch_size": 4, "image_token_id": 5}, tokens, odd="saved under the old key names"),
    entry("git", "multimodal", "GitForCausalLM", {**BERT, "vision_config": CLIP_VISION, "bos_token_id": 1,
        "eos_token_id": 2}, lambda: {**tokens(), **images()}),
    entry("vilt", "multimodal", "ViltModel", {**BERT, "image_size": 32, "patch_size": 8, "max_image_length": -1},
        lambda: {**tokens(), **images()}),
    entry("flava", "multimodal", "FlavaModel", {"text_config": BERT, "image_config": VIT,
        "multimodal_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 48}, "hidden_size": 32, "projection_dim": 16}, lambda: {**tokens(), **images()}),
    entry("pix2struct", "multimodal", "Pix2StructForConditionalGeneration", {"text_config": {"vocab_size": VOCABULARY,
        "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
        "decoder_start_token_id": 0, "eos_token_id": 1}, "vision_config": {"hidden_size": 32,
        "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
        "seq_len": 16}}, lambda: {"flattened_patches": floats(2, 6, 50).abs(), "decoder_input_ids": ids(5)}),
    entry("chameleon", "multimodal", "ChameleonForConditionalGeneration", {**LLAMA, "vocabulary_map": {"<image>": 5,
        **{f"IMGIMG{chr(65 + i)}Z": 20 + i for i in range(8)}}, "vq_config": {"embed_dim": 8, "num_embeddings": 8,
        "latent_channels": 8, "resolution": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1}}, tokens, odd="no assignment in v4"),
    entry("mllama", "multimodal", "MllamaForCausalLM", {**HEADS_OF_8, "cross_attention_layers": [],
        "rope_scaling": {"rope_type": "default"}}, tokens, majors=(5,), since=(5, 6)),
    entry("qwen2_audio", "multimodal", "Qwen2AudioForConditionalGeneration", {"text_config": {**LLAMA,
        "model_type": "qwen2"}, "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 32,
        "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16,
        "max_source_positions": 20}, "audio_token_index": 5}, tokens),
    entry("layoutlmv3", "multimodal", "LayoutLMv3ForTokenClassification", {**BERT, "input_size": 32, "patch_size": 8,
        "coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 64}, lambda: {**tokens(),
        "bbox": torch.zeros(2, 9, 4, dtype=torch.long), **images()}),
    entry("kosmos2", "multimodal", "Kosmos2ForConditionalGeneration", {"text_config": {"vocab_size": VOCABULARY,
        "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 64},
        "vision_config": VIT, "latent_query_num": 4}, lambda: {**tokens(), **images(),
        "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]] * 2)}),
]

COMPOSITE = [
    entry("vision_encoder_decoder", "composite", "VisionEncoderDecoderModel", {"encoder": {**VIT, "model_type": "vit"},
        "decoder": BERT_DECODER}, lambda: {**images(), "decoder_input_ids": ids(5)},
        odd="tied decoder inside; no assignment in v4"),
    entry("vision_encoder_decoder-trocr", "composite", "VisionEncoderDecoderModel", {"encoder": {**VIT,
        "model_type": "deit"}, "decoder": {"model_type": "trocr", "vocab_size": VOCABULARY, "d_model": 32,
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "cross_attention_hidden_size": 32}}, lambda: {**images(), "decoder_input_ids": ids(5)}),
    entry("encoder_decoder", "composite", "EncoderDecoderModel", {"encoder": {**BERT, "model_type": "bert"},
        "decoder": BERT_DECODER}, pairs, odd="no assignment in v4"),
    entry("encoder_decoder-gpt2", "composite", "EncoderDecoderModel", {"encoder": {**BERT, "model_type": "roberta"},
        "decoder": {**GPT, "model_type": "gpt2", "add_cross_attention": True}}, pairs),
    entry("speech_encoder_decoder", "composite", "SpeechEncoderDecoderModel", {"encoder": {**WAV2VEC2,
        "model_type": "wav2vec2"}, "decoder": BERT_DECODER}, lambda: {**sounds(), "decoder_input_ids": ids(5)},
        odd="weight norm and ties; no assignment in v4"),
    entry("vision_text_dual_encoder", "composite", "VisionTextDualEncoderModel", {"text_config": {**BERT,
        "model_type": "bert"}, "vision_config": {**VIT, "model_type": "vit"}, "projection_dim": 16},
        lambda: {**tokens(), **images()}),
    entry("musicgen", "composite", "MusicgenForConditionalGeneration", {"text_encoder": {**T5, "model_type": "t5"},
        "audio_encoder": {"model_type": "encodec", **CODEC, "num_lstm_layers": 1},
        "decoder": {"model_type": "musicgen_decoder", "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 48, "num_codebooks": 2, "max_position_embeddings": 64, "pad_token_id": 31,
        "bos_token_id": 31}}, lambda: {**tokens(), "decoder_input_ids": ids(5, high=30).repeat(2, 1)},
        odd="three models; wo stays float32; weight norm"),
]

MIXTURES = [
    entry("mixtral", "moe", "MixtralForCausalLM", {**LLAMA, **EXPERTS}, tokens, odd="per-expert on disk, fused in v5"),
    entry("qwen2_moe", "moe", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 16}, tokens,
        odd="per-expert on disk, fused in v5"),
    entry("qwen3_moe", "moe", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 8}, tokens,
        odd="per-expert on disk, fused in v5"),
    entry("olmoe", "moe", "OlmoeForCausalLM", MOE, tokens, odd="per-expert on disk, fused in v5"),
    entry("deepseek_v2", "moe", "DeepseekV2ForCausalLM", {**DEEPSEEK, "head_dim": 4}, tokens,
        odd="per-expert on disk, fused in v5"),
    entry("deepseek_v3", "moe", "DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 2, "topk_group": 1}, tokens,
        odd="correction bias is a buffer, float32 in v5"),
    entry("dots1", "moe", "Dots1ForCausalLM", {**DEEPSEEK, "n_group": 2, "topk_group": 1}, tokens),
    entry("glm4_moe", "moe", "Glm4MoeForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1, "head_dim": 8}, tokens),
    entry("phimoe", "moe", "PhimoeForCausalLM", {**LLAMA, **EXPERTS}, tokens),
    entry("granitemoe", "moe", "GraniteMoeForCausalLM", {**LLAMA, **EXPERTS}, tokens),
    entry("granitemoeshared", "moe", "GraniteMoeSharedForCausalLM", {**LLAMA, **EXPERTS,
        "shared_intermediate_size": 16}, tokens),
    entry("jetmoe", "moe", "JetMoeForCausalLM", {**LLAMA, "kv_channels": 8, **EXPERTS, "num_key_value_heads": 2},
        tokens),
    entry("dbrx", "moe", "DbrxForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}, tokens),
    entry("gpt_oss", "moe", "GptOssForCausalLM", {**HEADS_OF_8, **EXPERTS}, tokens,
        odd="norms stay float32 in v4, sinks in v5"),
    entry("minimax", "moe", "MiniMaxForCausalLM", {**HEADS_OF_8, **EXPERTS, "block_size": 4}, tokens),
    entry("ernie4_5_moe", "moe", "Ernie4_5_MoeForCausalLM", {**LLAMA, "moe_num_experts": 4, "moe_k": 2,
        "moe_intermediate_size": 16, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        tokens, odd="gate stays float32, strictly"),
    entry("hunyuan_v1_moe", "moe", "HunYuanMoEV1ForCausalLM", {**HEADS_OF_8, "num_experts": 4, "moe_topk": 2}, tokens),
    entry("flex_olmo", "moe", "FlexOlmoForCausalLM", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, tokens),
    entry("switch_transformers", "moe", "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}, pairs),
    entry("nllb_moe", "moe", "NllbMoeForConditionalGeneration", {**BART, "num_experts": 4, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2}, pairs),
    entry("qwen3_vl_moe", "moe", "Qwen3VLMoeForConditionalGeneration", {"text_config": {**MOE, "head_dim": 8,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "vision_config": {"depth": 2,
        "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, **QWEN_PATCHES,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN_TOKENS}, with_image_grids),
    entry("minimax_m2", "moe", "MiniMaxM2ForCausalLM", {**HEADS_OF_8, **EXPERTS}, tokens),
    entry("solar_open", "moe", "SolarOpenForCausalLM", {**DEEPSEEK, "head_dim": 8, "n_group": 1, "topk_group": 1},
        tokens),
]

STATE_SPACE = [
    entry("mamba", "state-space", "MambaForCausalLM", MAMBA, bare_tokens),
    entry("mamba2", "state-space", "Mamba2ForCausalLM", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2,
        "chunk_size": 8}, bare_tokens),
    entry("falcon_mamba", "state-space", "FalconMambaForCausalLM", MAMBA, bare_tokens,
        odd="unlearned norm buffers of ones"),
    entry("jamba", "state-space", "JambaForCausalLM", {**LLAMA, "num_experts": 2, "num_experts_per_tok": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}, tokens,
        odd="per-expert on disk, fused in v5"),
    entry("zamba", "state-space", "ZambaForCausalLM", {**LLAMA, "num_hidden_layers": 4, **WIDE_HEADS,
        "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2,
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": ["mamba",
        "hybrid", "mamba", "hybrid"]}, tokens, odd="a transformer block shared between layers"),
    entry("zamba2", "state-space", "Zamba2ForCausalLM", {**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4,
        **WIDE_HEADS, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8,
        "adapter_rank": 4, "num_mem_blocks": 1, "use_mem_eff_path": False, "layers_block_type": ["mamba", "hybrid",
        "mamba", "hybrid"], "hybrid_layer_ids": [1, 3]}, tokens,
        odd="a transformer block shared between layers, with adapters", majors=(5, ), since=(5, 1)),
    entry("bamba", "state-space", "BambaForCausalLM", {**LLAMA, "attn_layer_indices": [1], **MAMBA_2_PART}, tokens),
    entry("falcon_h1", "state-space", "FalconH1ForCausalLM", {**HEADS_OF_8, **MAMBA_2_PART, "mamba_d_ssm": 64}, tokens,
        odd="a non-persistent multiplier buffer"),
    entry("granitemoehybrid", "state-space", "GraniteMoeHybridForCausalLM", {**LLAMA, "layer_types": ["mamba",
        "attention"], **MAMBA_2_PART, **EXPERTS, "shared_intermediate_size": 16}, tokens),
    entry("recurrent_gemma", "state-space", "RecurrentGemmaForCausalLM", {**HEADS_OF_8, "lru_width": 32,
        "block_types": ["recurrent", "attention"], "attention_window_size": 8}, tokens),
    entry("rwkv", "state-space", "RwkvForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32,
        "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64,
        "rescale_every": 1}, bare_tokens,
        odd="time_decay and time_first stay float32; evaluation divides weights in place"),
    entry("lfm2", "state-space", "Lfm2ForCausalLM", {**LLAMA, "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8}, tokens),
    entry("xlstm", "state-space", "xLSTMForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64,
        "qk_dim_factor": 1.0, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4, "chunk_size": 8,
        "ffn_round_up_to_multiple_of": 16, **SPECIAL}, lambda: bare_tokens(8), majors=(5, ), trains=False),
    entry("qwen3_next", "state-space", "Qwen3NextForCausalLM", {**MOE, "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}, tokens),
    entry("nemotron_h", "state-space", "NemotronHForCausalLM", {**HEADS_OF_8, "layers_block_type": ["mamba",
        "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8},
        tokens),
]
# fmt: on

ARCHITECTURES = [
    *ENCODERS,
    *DECODERS,
    *ENCODER_DECODERS,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
    *COMPOSITE,
    *MIXTURES,
    *STATE_SPACE,
]
AVAILABLE = [architecture for architecture in ARCHITECTURES if architecture.is_available]


# Kinds that went wrong before, in transformers or in prototypes of ours: they stand in every sample.
ALWAYS = (
    "albert", "gpt2", "qwen2-tied", "t5", "seamless_m4t_v2-untied", "resnet", "wav2vec2", "blip_2", "llava",
    "vision_encoder_decoder", "mixtral", "deepseek_v3", "rwkv",
)  # fmt: skip


def sample(seed: int = 5) -> list[Architecture]:
    """Return those that always stand, and one more of each family, drawn with the seed from those available."""
    chance = random.Random(seed)
    drawn = [architecture for architecture in AVAILABLE if architecture.name in ALWAYS]
    for family in FAMILIES:
        drawn.append(chance.choice([each for each in AVAILABLE if each.family == family and each not in drawn]))
    return drawn
