"""Mistral 7B and its successors: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family, same_window

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    only={"hidden_act": "silu"},
    switches=same_window,
)
