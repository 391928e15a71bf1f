"""Qwen 3, mixtures of experts: Qwen 3 with many small experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seesaw_ds.model.families.family import Family, same_window
from seesaw_ds.model.families.qwen3 import QWEN3


def _switches(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": int(config["moe_intermediate_size"]),
        "num_experts": int(config.get("num_experts") or config.get("num_local_experts") or 128),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "has_normalized_experts": bool(config["norm_topk_prob"]),
        **(same_window(config) if config.get("use_sliding_window") else {}),
    }


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    norms=QWEN3.norms,
    qk_norm="head",
    experts="mlp.experts",
    router="mlp.gate",
    gate_up=("gate_proj", "up_proj"),
    down="down_proj",
    defaults={
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    only={"attention_bias": False, "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []},
    switches=_switches,
)
