"""Gemma 3, text: Gemma 2 with norms on queries and keys, five local layers to a global one, a rotary base for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seesaw_ds.model.families.family import Family, windows_by_layer_type
from seesaw_ds.model.families.gemma2 import GEMMA_NORMS


def _switches(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    pattern = config.get("sliding_window_pattern") or 6
    layer_types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in layers]
    return {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_soft_cap": config.get("final_logit_softcapping"),
        # With linear scaling this is the length after it.
        "max_position_embeddings": int(config["max_position_embeddings"]),
        **windows_by_layer_type(config, layer_types, has_ropes=True),
    }


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    norms=GEMMA_NORMS | {"query": "self_attn.q_norm", "key": "self_attn.k_norm"},
    qk_norm="head",
    norm_adds_one=True,
    activation="gelu_tanh",
    defaults={
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    only={
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
    },
    switches=_switches,
)
