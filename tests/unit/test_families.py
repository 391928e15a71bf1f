"""What is read from the configs of each family, and how its checkpoints are cut into cells."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from cells import load_cells
from family_models import LONGROPE, WINDOW, family_config, make_family
from seesaw_ds.checkpoint.source import SafetensorsSource
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.families import FAMILIES
from seesaw_ds.model.families.family import AttentionKind
from seesaw_ds.model.rope import ModelRotation
from seesaw_ds.model.tensors import expected_tensors, replicated_tensors
from seesaw_ds.model.weights import DummySource
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

SLIDING, FULL = AttentionKind(WINDOW), AttentionKind()


def config_dict(architecture: str, **changes) -> dict:
    return family_config(architecture).to_dict() | changes


def published(architecture: str, **values) -> dict:
    """A config with as few keys as publishers write."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 301}
    return {"architectures": [architecture], "num_attention_heads": 8, **sizes, **values}


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (published("MistralForCausalLM"), (AttentionKind(4096),) * 8),
        (published("MistralForCausalLM", sliding_window=None), (FULL,) * 8),
        (published("Phi3ForCausalLM", sliding_window=WINDOW), (SLIDING,) * 8),
        (published("Qwen2ForCausalLM", sliding_window=WINDOW, use_sliding_window=False), ()),
        (
            published("Qwen3ForCausalLM", sliding_window=WINDOW, use_sliding_window=True, max_window_layers=3),
            (FULL,) * 3 + (SLIDING,) * 5,
        ),
        (published("Gemma2ForCausalLM", sliding_window=WINDOW), (SLIDING, FULL) * 4),
        (
            published("Gemma3ForCausalLM", sliding_window=WINDOW, sliding_window_pattern=3),
            ((AttentionKind(WINDOW, "sliding_attention"),) * 2 + (AttentionKind(None, "full_attention"),)) * 2
            + (AttentionKind(WINDOW, "sliding_attention"),) * 2,
        ),
        (published("MixtralForCausalLM"), (FULL,) * 8),
        (published("Qwen3MoeForCausalLM", use_sliding_window=True, sliding_window=WINDOW), (SLIDING,) * 8),
    ],
)
def test_windows_are_those_of_the_layers(config, attention):
    assert model_shape(config).attention == attention


def test_layers_know_their_kind_of_attention():
    shape = model_shape(published("Gemma2ForCausalLM", sliding_window=WINDOW))
    assert shape.attention_kinds == (SLIDING, FULL)
    assert [shape.layer_kind(layer) for layer in range(8)] == [0, 1] * 4
    plain = model_shape(published("LlamaForCausalLM"))
    assert plain.attention_kinds == (FULL,) and plain.layer_kind(7) == 0


def test_absent_values_are_those_of_the_family():
    gemma = model_shape(published("Gemma2ForCausalLM"))
    assert (gemma.head_dim, gemma.tie_word_embeddings, gemma.embedding_scale) == (256, True, 8.0)
    assert (gemma.attention_soft_cap, gemma.logit_soft_cap, gemma.attention_scale) == (50.0, 30.0, 1 / 16)
    moe = model_shape(published("Qwen3MoeForCausalLM"))
    assert (moe.num_experts, moe.experts_per_token, moe.intermediate_size) == (128, 8, 768)
    assert not moe.has_normalized_experts
    mixtral = model_shape(published("MixtralForCausalLM"))
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.has_normalized_experts) == (8, 2, True)


def test_granites_multipliers():
    shape = model_shape(config_dict("GraniteForCausalLM"))
    assert (shape.embedding_scale, shape.attention_scale, shape.residual_scale, shape.logit_scale) == (
        3.0,
        0.25,
        0.6,
        0.5,
    )


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Qwen3ForCausalLM", {"attention_bias": True}, "^attention_bias=true .*for Qwen3ForCausalLM; only false"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "^attn_logit_softcapping=50.0 .*; only null"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "^use_bidirectional_attention=true"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "^hidden_activation='gelu' .*; only gelu_pytorch_tanh"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 4}, r"^layer_types=\['chunked_attention'\] in"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 3}, "^layer_types in config.json: has 3 entries"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75, "rope_parameters": None}, "^partial_rotary_factor=0.75"),
        ("Phi3ForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "^partial_rotary_factor=0.5"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}, r"^mlp_only_layers=\[1\] .*; only \[\]"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "^decoder_sparse_step=2 .*; only 1"),
    ],
)
def test_switch_that_is_not_supported_is_named(architecture, changes, message):
    with pytest.raises(UserError, match=message):
        model_shape(config_dict(architecture, **changes))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_checkpoint_has_the_expected_tensors(architecture, tmp_path):
    make_family(tmp_path, architecture, num_hidden_layers=2, **only_two_layers(architecture))
    shape = model_shape(read_hf_config(tmp_path))
    assert check_checkpoint(tmp_path, shape).keys() == expected_tensors(shape).keys()


def only_two_layers(architecture: str) -> dict:
    return {"layer_types": ["sliding_attention", "full_attention"]} if architecture == "Gemma3ForCausalLM" else {}


def joined(source, shape: ModelShape, layer: int, num_cells: int) -> dict[str, torch.Tensor]:
    """A layer's cells put together: (parts, rows, hidden) of every matrix, parts being an expert's gate, say."""
    experts = max(1, shape.num_experts)
    num_parts = {"qkv": 1, "o": 1, "gate_up": 2 * experts, "down": experts}
    cells = load_cells(source, shape, layer, num_cells)
    return {
        name: torch.cat([cell[name].unflatten(0, (parts, -1)) for cell in cells], dim=1)
        for name, parts in num_parts.items()
    }


@pytest.mark.parametrize("num_cells", [1, 2, 4])
def test_fused_projections_are_cut_as_separate_ones(tmp_path, num_cells):
    tensors = make_family(tmp_path, "Phi3ForCausalLM").state_dict()
    shape = model_shape(read_hf_config(tmp_path))
    source = SafetensorsSource(shape, check_checkpoint(tmp_path, shape), torch.float32)
    layer = joined(source, shape, 1, num_cells)
    gate_up = tensors["model.layers.1.mlp.gate_up_proj.weight"]
    assert torch.equal(layer["gate_up"].flatten(0, 1), gate_up)
    qkv = layer["qkv"].view(shape.num_kv_heads, -1, shape.head_dim, shape.hidden_size)
    by_projection = torch.cat([part.reshape(-1, shape.hidden_size) for part in qkv.split((2, 1, 1), dim=1)])
    assert torch.equal(by_projection, tensors["model.layers.1.self_attn.qkv_proj.weight"])


@pytest.mark.parametrize("num_cells", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_every_expert_is_cut(tmp_path, architecture, num_cells):
    tensors = make_family(tmp_path, architecture).state_dict()
    shape = model_shape(read_hf_config(tmp_path))
    source = SafetensorsSource(shape, check_checkpoint(tmp_path, shape), torch.float32)
    layer = joined(source, shape, 2, num_cells)
    gate_up = tensors["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(layer["gate_up"].unflatten(0, (shape.num_experts, 2)).flatten(1, 2), gate_up)
    assert torch.equal(layer["down"], tensors["model.layers.2.mlp.experts.down_proj"].transpose(1, 2))
    assert torch.equal(source.replicated("router.2"), tensors["model.layers.2.mlp.gate.weight"])


def test_biases_are_grouped_by_kv_head(tmp_path):
    tensors = make_family(tmp_path, "Qwen2ForCausalLM").state_dict()
    shape = model_shape(read_hf_config(tmp_path))
    source = SafetensorsSource(shape, check_checkpoint(tmp_path, shape), torch.float32)
    bias = source.replicated("qkv_bias.3").view(shape.num_kv_heads, 4, shape.head_dim)
    for name, part in zip("qkv", bias.split((2, 1, 1), dim=1), strict=True):
        assert torch.equal(part.flatten(), tensors[f"model.layers.3.self_attn.{name}_proj.bias"])


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"])
def test_dummy_weights_are_the_same_model_in_every_cut(architecture):
    shape = model_shape(config_dict(architecture))
    source = DummySource(shape, torch.float32, torch.device("cpu"), seed=0)
    whole = joined(source, shape, 1, 1)
    for num_cells in (2, 4):
        for name, matrix in joined(source, shape, 1, num_cells).items():
            assert torch.equal(matrix, whole[name]), name
    for name, replicated in replicated_tensors(shape).items():
        assert source.replicated(name).shape == replicated.shape
    assert source.replicated("final").unique().tolist() == [0.0 if shape.family.norm_adds_one else 1.0]


def check_rotation(config: dict, module: torch.nn.Module, *layer_types: str) -> None:
    """Angles of one long sequence, for each attention kind, against transformers' module."""
    shape = model_shape(config)
    positions = torch.arange(100)
    places = ModelRotation(config, shape, torch.device("cpu")).places(
        positions, torch.full_like(positions, 100), positions, positions
    )
    assert len(places) == max(1, len(layer_types))
    x = torch.zeros(1)
    for place, layer_type in zip(places, layer_types or (None,), strict=True):
        expected = module(x, positions[None], layer_type) if layer_type else module(x, positions[None])
        assert torch.equal(place.cos, expected[0][0]) and torch.equal(place.sin, expected[1][0])


def test_gemma_3_has_a_rotary_base_for_each_kind():
    config = config_dict("Gemma3ForCausalLM")
    module = Gemma3RotaryEmbedding(family_config("Gemma3ForCausalLM"))
    check_rotation(config, module, "sliding_attention", "full_attention")
    # As the models were first published.
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    check_rotation(old, module, "sliding_attention", "full_attention")


def test_phi_3_finds_the_length_that_longrope_starts_from():
    values = {"original_max_position_embeddings": 64, "rope_parameters": dict(LONGROPE)}
    config = family_config("Phi3ForCausalLM", **values)
    check_rotation(config.to_dict(), Phi3RotaryEmbedding(config))
