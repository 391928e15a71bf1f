"""Gemma 2: norms before and after, soft caps on scores and logits, a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seesaw_ds.model.families.family import Family, windows_by_layer_type

GEMMA_NORMS = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_ffn": "pre_feedforward_layernorm",
    "after_ffn": "post_feedforward_layernorm",
}


def _switches(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    return {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_soft_cap": config["attn_logit_softcapping"],
        "logit_soft_cap": config["final_logit_softcapping"],
        **windows_by_layer_type(config, ["full_attention" if i % 2 else "sliding_attention" for i in layers]),
    }


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    norms=GEMMA_NORMS,
    norm_adds_one=True,
    activation="gelu_tanh",
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    only={
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
    },
    switches=_switches,
)
