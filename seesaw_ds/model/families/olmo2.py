"""OLMo 2: norms after attention and FFN instead of before, and over the whole query and key projections."""

from __future__ import annotations

from seesaw_ds.model.families.family import Family

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    norms={
        "after_attention": "post_attention_layernorm",
        "after_ffn": "post_feedforward_layernorm",
        "query": "self_attn.q_norm",
        "key": "self_attn.k_norm",
    },
    qk_norm="projection",
    defaults={"rms_norm_eps": 1e-5},
    only={"attention_bias": False, "hidden_act": "silu"},
)
