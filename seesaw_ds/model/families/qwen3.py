"""Qwen 3, dense: Llama with a norm on every head's query and key."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family, windows_in_late_layers

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    norms={
        "before_attention": "input_layernorm",
        "before_ffn": "post_attention_layernorm",
        "query": "self_attn.q_norm",
        "key": "self_attn.k_norm",
    },
    qk_norm="head",
    defaults={"head_dim": 128, "sliding_window": 4096, "max_position_embeddings": 32768},
    only={"attention_bias": False, "hidden_act": "silu"},
    switches=windows_in_late_layers,
)
