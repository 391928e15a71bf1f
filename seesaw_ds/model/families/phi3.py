"""Phi-3: Llama with fused projections in the file."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family, same_window

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    only={"hidden_act": "silu"},
    switches=same_window,
)
