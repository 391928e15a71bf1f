"""Mixtral: Mistral with a mixture of experts, two of eight for a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seesaw_ds.model.families.family import Family, same_window


def _switches(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        **same_window(config),
    }


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.gate",
    gate_up=("w1", "w3"),
    down="w2",
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    only={"hidden_act": "silu"},
    switches=_switches,
)
