"""Llama 2 and 3, and the many models published in their form."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    only={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
)
