"""Model sizes from a Hugging Face config, against the config class and the model of transformers."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaForCausalLM

from models import llama_config
from seesaw_ds.errors import UserError
from seesaw_ds.shapes import model_shape, read_hf_config


def config_dict(**changes) -> dict:
    return llama_config(architectures=["LlamaForCausalLM"]).to_dict() | changes


def test_sizes_are_those_of_the_config():
    shape = model_shape(config_dict(rms_norm_eps=1e-5))
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size) == (4, 64, 96)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.queries_per_kv_head) == (8, 4, 8, 2)
    assert (shape.vocab_size, shape.max_position_embeddings) == (128, 256)
    assert (shape.rms_norm_eps, shape.tie_word_embeddings, shape.dtype) == (1e-5, False, "float32")


def test_layer_parameters_are_those_of_the_matrices():
    model = LlamaForCausalLM(llama_config())
    count = sum(weight.numel() for weight in model.model.layers[0].parameters() if weight.dim() == 2)
    assert model_shape(config_dict()).layer_parameters == count


def test_absent_values_have_the_defaults_of_transformers():
    config = config_dict(head_dim=None, torch_dtype="bfloat16")
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "dtype"):
        del config[key]
    shape = model_shape(config)
    assert (shape.num_kv_heads, shape.head_dim) == (8, 64 // 8)
    assert (shape.rms_norm_eps, shape.tie_word_embeddings, shape.dtype) == (1e-6, False, "bfloat16")


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
    ],
)
def test_rope_that_stretches_takes_longer_sequences(rope, longest):
    assert model_shape(config_dict(rope_parameters=rope)).max_position_embeddings == longest


def test_kv_block_bytes_count_keys_and_values():
    shape = model_shape(config_dict())
    assert shape.kv_block_bytes(num_layers=3, num_kv_heads=2, block_size=16, dtype="bfloat16") == 3 * 2 * 2 * 16 * 8 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"MambaForCausalLM.*not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, r"architectures=\['\(none\)'\]: not supported"),
        ({"attention_bias": True}, "attention_bias=true in config.json: not supported"),
        ({"mlp_bias": True}, "mlp_bias=true in config.json: not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json: not supported.*only silu"),
        ({"hidden_size": "wide"}, "a size is not a number"),
        ({"num_attention_heads": 0}, "^num_attention_heads=0 in config.json: must be a multiple of"),
        ({"num_key_value_heads": 3}, "^num_attention_heads=8 in config.json: must be a multiple of.*=3"),
        ({"dtype": "int8"}, "dtype='int8' in config.json: must be one of float32, bfloat16, float16"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_shape(config_dict(**changes))


def test_missing_size_is_named():
    config = config_dict()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size is missing"):
        model_shape(config)


def test_config_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 7}))
    assert read_hf_config(tmp_path) == {"hidden_size": 7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json there; model must be a folder in Hugging Face format"),
        ("{", "config.json cannot be read"),
        ("[1]", "config.json must hold a JSON object"),
    ],
)
def test_config_file_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)
