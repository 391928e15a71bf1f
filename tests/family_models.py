"""A small random model of each family in Hugging Face format, with its own switches turned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from models import randomize
from seesaw_ds.model.families import FAMILIES

WINDOW = 24

SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2],
    "long_factor": [1.0, 1.5, 2.0, 3.0],
}

SWITCHES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": WINDOW, "head_dim": 16},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3ForCausalLM": {"head_dim": 16, "tie_word_embeddings": True},
    "Phi3ForCausalLM": {"sliding_window": WINDOW},
    "GraniteForCausalLM": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "Olmo2ForCausalLM": {},
    "Gemma2ForCausalLM": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "Gemma3ForCausalLM": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3MoeForCausalLM": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
    },
}
"""What each family's config has beside `SIZES`."""


def family_config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a small model of the family, with `changes` made."""
    values = {**SIZES, **SWITCHES[architecture], "architectures": [architecture], **changes}
    return AutoConfig.for_model(FAMILIES[architecture].model_type, **values)


def make_family(folder: Path, architecture: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a float32 model of `family_config` to `folder` and return it, ready to generate."""
    config = family_config(architecture, **changes)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    randomize(model, seed, norm_center=0.0 if FAMILIES[architecture].norm_adds_one else 1.0)
    model.save_pretrained(folder)
    return model
