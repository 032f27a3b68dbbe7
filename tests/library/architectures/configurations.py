"""Options that shrink architectures of transformers, by family: name, which is its `model_type`, -> `Host`.

Where the options of a family agree they stand once, above the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]
# fmt: off
IDS: Options = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS: Options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: Options = {**IDS, **BLOCKS, "max_position_embeddings": 64}
LLAMA: Options = {**TEXT, "num_key_value_heads": 2}
HEAD: Options = {**LLAMA, "head_dim": 8}
GPT: Options = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART: Options = {
    **IDS,
    "decoder_start_token_id": 1,
    "d_model": 32,
    "max_position_embeddings": 64,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
    },
}
T5: Options = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MOE: Options = {
    **LLAMA,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT: Options = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK: Options = {
    **LATENT,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MAMBA2: Options = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
DELTA: Options = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
IMAGE: Options = {**BLOCKS, "image_size": 16, "patch_size": 8}
PYRAMID: Options = {"depths": [1, 1], "hidden_sizes": [16, 32]}
SEGMENTS: Options = {
    **PYRAMID,
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
WINDOWS: Options = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
}
WAVE: Options = {
    **BLOCKS,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
TOWERS: Options = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
CLIP_EYE: Options = {**IMAGE, "model_type": "clip_vision_model"}
# fmt: on


@dataclass(frozen=True)
class Host:
    """One architecture.

    Attributes:
        kind: what its input is, a key of `tests.library.architectures.inputs.KINDS`.
        options: of its configuration.
        auto: the class of transformers that builds it.
        shape: of one row of its main input, where the kind does not say it.
    """

    kind: str
    options: Options = field(default_factory=dict)
    auto: str = "AutoModel"
    shape: tuple[int, ...] = ()


# fmt: off
def encoders() -> dict[str, Host]:
    plain = [
        "bert",
        "roberta",
        "electra",
        "albert",
        "deberta",
        "deberta-v2",
        "mpnet",
        "rembert",
        "roformer",
        "nystromformer",
        "ibert",
        "esm",
        "xlm",
        "modernbert",
        "nomic_bert",
        "gte",
        "fnet",
    ]
    special: dict[str, Options] = {
        "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        "deberta-v2": {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
        },
        "deberta": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
        "squeezebert": {
            **TEXT,
            "embedding_size": 32,
            **{f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")},
        },
        "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "longformer": {**TEXT, "attention_window": 4},
        "convbert": {**TEXT, "embedding_size": 32},
        "mobilebert": {**TEXT, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
        "big_bird": {**TEXT, "attention_type": "original_full"},
        "layoutlm": {**TEXT, "max_2d_position_embeddings": 16},
    }
    kinds = {"longformer": "text with global attention"}
    return {name: Host(kinds.get(name, "text"), special.get(name, TEXT)) for name in sorted({*plain, *special})}


def decoders() -> dict[str, Host]:
    plain = dict.fromkeys(
        [
            "llama",
            "mistral",
            "qwen2",
            "phi",
            "phi3",
            "stablelm",
            "starcoder2",
            "olmo2",
            "cohere",
            "granite",
            "nemotron",
            "persimmon",
            "glm4",
            "smollm3",
            "bitnet",
            "opt",
            "gpt_neox",
            "mixtral",
        ],
        LLAMA,
    ) | dict.fromkeys(["qwen3", "gemma", "gemma3_text"], HEAD)
    special: dict[str, Options] = {
        "opt": {**IDS, **BLOCKS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "gpt_neox": TEXT,
        "biogpt": TEXT,
        "gpt2": GPT,
        "gptj": {**GPT, "rotary_dim": 4},
        "codegen": {**GPT, "rotary_dim": 4},
        "gpt_neo": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
                    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
        "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
        "ctrl": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64},
        "minicpm3": LATENT,
        "mixtral": MOE,
        "qwen2_moe": MOE,
        "gpt_oss": {**MOE, "head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "deepseek_v3": DEEPSEEK,
        "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
        "mamba2": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4,
                   "head_dim": 16, "n_groups": 1, "chunk_size": 4},
        "jamba": {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                  "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 8},
        "bamba": {**LLAMA, **MAMBA2, "attn_layer_indices": [1]},
        "recurrent_gemma": {**HEAD, "lru_width": 32, "attention_window_size": 8,
                            "block_types": ["recurrent", "attention"]},
        "qwen3_next": {**MOE, **DELTA},
        "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    }
    return {
        name: Host("causal", options, "AutoModelForCausalLM") for name, options in sorted((plain | special).items())
    }


def pairs() -> dict[str, Host]:
    plain = ["bart", "mbart", "pegasus", "marian", "m2m_100"]
    gemma = {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 8}
    special: dict[str, Options] = {
        "t5": T5,
        "umt5": T5,
        "longt5": {**T5, "local_radius": 3},
        "switch_transformers": {**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
                                "num_sparse_decoder_layers": 1, "num_experts": 2, "expert_capacity": 64},
        "nllb-moe": {**BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
                     "expert_capacity": 64},
        "led": {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64},
        "fsmt": {**BART, "langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64},
        "prophetnet": {"vocab_size": 64, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ngram": 2,
                       "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
                       "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1},
        "t5gemma": {"encoder": gemma, "decoder": {**gemma, "cross_attention_hidden_size": 32}, "vocab_size": 64},
    }
    options = dict.fromkeys(plain, BART) | special
    kinds = {"led": "pairs with global attention"}
    return {n: Host(kinds.get(n, "pairs"), options[n], "AutoModelForSeq2SeqLM") for n in sorted(options)}


def images() -> dict[str, Host]:
    plain = ["vit", "deit", "beit", "dinov2"]
    special: dict[str, tuple[Options, tuple[int, ...]]] = {
        "vitdet": ({**IMAGE, "pretrain_image_size": 16}, (3, 16, 16)),
        "swin": (WINDOWS, (3, 16, 16)),
        "swinv2": (WINDOWS, (3, 16, 16)),
        "convnext": ({**PYRAMID, "num_stages": 2, "layer_scale_init_value": 1.0}, (3, 32, 32)),
        "segformer": ({**SEGMENTS, "sr_ratios": [2, 1]}, (3, 32, 32)),
        "pvt": (
            {**SEGMENTS, "image_size": 32, "patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
            (3, 32, 32),
        ),
        "yolos": ({**IMAGE, "image_size": [16, 16], "num_detection_tokens": 4}, (3, 16, 16)),
        "videomae": ({**IMAGE, "num_frames": 4, "tubelet_size": 2}, (4, 3, 16, 16)),
        "timesformer": ({**IMAGE, "num_frames": 2}, (2, 3, 16, 16)),
    }
    options = dict.fromkeys(plain, (IMAGE, (3, 16, 16))) | special
    return {name: Host("image", options[name][0], shape=options[name][1]) for name in sorted(options)}


def others() -> dict[str, Host]:
    speech = {**BART, "max_source_positions": 20, "max_target_positions": 32}
    eyes = {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP_EYE, "image_token_id": 63}
    return {
        **{name: Host("wave", WAVE) for name in ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio")},
        "wav2vec2-bert": Host("frames", {**BLOCKS, "feature_projection_input_dim": 8, "mask_time_prob": 0.0,
                                         "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 4,
                                         "right_max_position_embeddings": 4}, shape=(12, 8)),
        "audio-spectrogram-transformer": Host("signal", {**BLOCKS, "patch_size": 4, "frequency_stride": 4,
                                                         "time_stride": 4, "max_length": 16, "num_mel_bins": 8},
                                              shape=(16, 8)),
        "whisper": Host("speech", {**speech, "num_mel_bins": 8}, "AutoModelForSpeechSeq2Seq", (8, 40)),
        "speech_to_text": Host("speech frames", {**speech, "input_feat_per_channel": 8, "conv_channels": 16,
                                                 "max_source_positions": 64}, "AutoModelForSpeechSeq2Seq", (40, 8)),
        **{name: Host("towers", TOWERS) for name in ("clip", "siglip", "altclip", "chinese_clip")},
        "git": Host("towers", {**TEXT, "vision_config": IMAGE}),
        "vilt": Host("towers", {**TEXT, "image_size": 16, "patch_size": 8}),
        "layoutlmv3": Host("towers", {**TEXT, "coordinate_size": 4, "shape_size": 8, "input_size": 16,
                                      "patch_size": 8}),
        "llava": Host("eyes", {**eyes, "vision_feature_layer": -1}, "AutoModelForImageTextToText"),
        "paligemma": Host("eyes", {"text_config": {**HEAD, "model_type": "gemma"},
                                   "vision_config": {**IMAGE, "model_type": "siglip_vision_model",
                                                     "projection_dim": 32},
                                   "image_token_id": 63, "projection_dim": 32, "hidden_size": 32},
                          "AutoModelForImageTextToText"),
        "patchtst": Host("series", {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4,
                                    "d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
                                    "do_mask_input": False, "norm_type": "layernorm"}, shape=(16, 2)),
        "perceiver": Host("arrays", {"num_latents": 4, "d_latents": 32, "d_model": 32, "num_blocks": 1,
                                     "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                                     "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32},
                          shape=(8, 32)),
    }
