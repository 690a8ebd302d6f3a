"""List the tiny transformers models that captures are held against by name, beside the zoo that loading is proven on.

Entries are as in `architectures`. ``NAMED`` is the list that must be covered; ``ABSENT`` says which of it the installed
transformers does not have. EdgeTAM runs on a backbone of ours in place of timm's, see `feature_maps`.
"""

from __future__ import annotations

import torch
from feature_maps import FeatureMapsConfig

from architectures import (
    BERT,
    CNN,
    LLAMA,
    MAJOR,
    SIGLIP_TOWER,
    VIT,
    VOCABULARY,
    entry,
    floats,
    ids,
    images,
    tokens,
    with_image_tokens,
)

RESNET = {"model_type": "resnet", **CNN, "embedding_size": 16, "layer_type": "basic"}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
}
SMALL_BLT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
DINO = {"model_type": "dinov2", **VIT, "image_size": 16, "num_hidden_layers": 3}

EDGETAM = {
    "vision_config": {
        "model_type": "edgetam_vision_model",
        "backbone_config": {"model_type": FeatureMapsConfig.model_type},
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
}

# fmt: off
EXTRA = [
    entry("aria", "multimodal", "AriaForConditionalGeneration", {"text_config": {**LLAMA, "model_type": "aria_text",
        "moe_num_experts": 4}, "vision_config": {**VIT, "model_type": "idefics3_vision"}, "image_token_index": 5,
        "projector_patch_to_query_dict": {16: 4}}, lambda: with_image_tokens(4)),
    entry("blt", "decoder", "BltForCausalLM", {"vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "patch_in_forward": True, "patch_size": 4, "max_patch_length": 4, "cross_attn_k": 1,
        "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3],
        "patcher_config": {**SMALL_BLT, "vocab_size": VOCABULARY},
        "encoder_config": {**SMALL_BLT, "vocab_size": VOCABULARY, "cross_attn_k": 1, "hidden_size_global": 32},
        "decoder_config": {**SMALL_BLT, "vocab_size": VOCABULARY, "cross_attn_k": 1, "hidden_size_global": 32},
        "global_config": SMALL_BLT, "pad_token_id": 0}, lambda: {**tokens(), "use_cache": False}),
    entry("cohere2_vision", "multimodal", "Cohere2VisionForConditionalGeneration", {"text_config": {**LLAMA,
        "model_type": "cohere2"}, "vision_config": SIGLIP_TOWER, "image_token_id": 5, "downsample_factor": 2,
        "alignment_intermediate_size": 64}, lambda: with_image_tokens(4)),
    entry("conditional_detr", "vision", "ConditionalDetrForObjectDetection", {**DETR,
        "backbone_config": {**RESNET, "out_features": ["stage2"]}}, images),
    entry("deformable_detr", "vision", "DeformableDetrForObjectDetection", {**DETR, "num_feature_levels": 2,
        "backbone_config": {**RESNET, "out_features": ["stage1", "stage2"]}}, lambda: images(64)),
    entry("depth_pro", "vision", "DepthProForDepthEstimation", {"fusion_hidden_size": 16, "patch_size": 16,
        "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [16, 16], "scaled_images_ratios": [0.5, 1.0],
        "scaled_images_overlap_ratios": [0.0, 0.5], "scaled_images_feature_dims": [16, 16],
        "image_model_config": DINO, "patch_model_config": DINO, "fov_model_config": DINO}, lambda: images(32)),
    entry("doge", "decoder", "DogeForCausalLM", {**LLAMA, "keep_window_size": 8}, tokens),
    entry("ernie4_5_vl_moe", "multimodal", "Ernie4_5_VLMoeForConditionalGeneration", {"text_config": {**LLAMA,
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2]}}, "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48,
        "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_merge_size": 2},
        "image_start_token_id": 7, "image_end_token_id": 8, "image_token_id": 5, "video_token_id": 6}, lambda: {
        **(shown := with_image_tokens(4, pixel_values=floats(32, 48), image_grid_thw=torch.tensor([[1, 4, 4]] * 2))),
        "mm_token_type_ids": (shown["input_ids"] == 5).long()}),
    entry("evolla", "multimodal", "EvollaForProteinText2Text", {**LLAMA, "protein_encoder_config": {**BERT,
        "vocab_size": 40, "mask_token_id": 4, "position_embedding_type": "rotary"}, "aligner_num_add_layers": 1,
        "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2, "resampler_num_latents": 4}, lambda: {
        **tokens(), "protein_input_ids": ids(7, high=40), "protein_attention_mask": torch.ones(2, 7).long()}),
    entry("metaclip_2", "multimodal", "MetaClip2Model", {"text_config": {**BERT, "projection_dim": 16,
        "bos_token_id": 1, "eos_token_id": 2}, "vision_config": {**VIT, "projection_dim": 16}, "projection_dim": 16},
        lambda: {**tokens(), **images()}),
    entry("edgetam", "vision", "EdgeTamModel", EDGETAM, lambda: {**images(64),
        "input_points": floats(2, 1, 1, 2).abs()}),
    entry("edgetam_video", "vision", "EdgeTamVideoModel", {**EDGETAM, "image_size": 64,
        "memory_attention_hidden_size": 32, "memory_attention_mlp_hidden_size": 48,
        "memory_attention_rope_feat_sizes": [4, 4], "memory_attention_rope_k_sizes": [4, 4],
        "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 8, "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32, "memory_fuser_intermediate_dim": 48, "perceiver_resampler_hidden_size": 8,
        "perceiver_resampler_mlp_intermediate_size": 16, "perceiver_resampler_num_latents": 16}, lambda: images(64),
        forward="get_image_features", odd="its forward takes a session; the images are what has states"),
    entry("mlcd", "vision", "MLCDVisionModel", VIT, images),
]
# fmt: on

# What the issue names. A dash and a word after it tell entries of one type apart.
NAMED = (
    "aria", "aya_vision", "bert", "blip_2", "blt", "clip", "cohere2_vision", "conditional_detr", "deformable_detr",
    "depth_pro", "doge", "edgetam", "edgetam_video", "ernie4_5_moe", "ernie4_5_vl_moe", "esm", "evolla", "llama",
    "metaclip_2", "mixtral", "mlcd", "seamless_m4t_v2", "t5", "vision_encoder_decoder", "vit", "whisper",
)  # fmt: skip
ABSENT = {"ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration"} if MAJOR == 4 else {}
