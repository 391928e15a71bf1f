"""Granite 3, dense: Llama with a multiplier on embeddings, attention scores, each layer's output and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seesaw_ds.model.families.family import Family


def _multipliers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


GRANITE = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    only={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    switches=_multipliers,
)
