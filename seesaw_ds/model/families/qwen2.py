"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family, windows_in_late_layers

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    has_qkv_bias=True,
    defaults={"sliding_window": 4096, "max_position_embeddings": 32768},
    only={"hidden_act": "silu"},
    switches=windows_in_late_layers,
)
