"""Rotary embeddings against transformers' own, through a lone sequence's generate with a fresh model."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seesaw_ds.errors import UserError
from seesaw_ds.model.rope import RotaryTables

HEAD_DIM = 16
MAX_POSITIONS = 64
ORIGINAL_LEN = 24  # where longrope changes its frequencies
HALF = HEAD_DIM // 2

KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LEN,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def make_config(kind: str, **changes) -> LlamaConfig:
    settings = {
        "vocab_size": 32,
        "hidden_size": 4 * HEAD_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_theta": 1000.0, **KINDS[kind]},
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def generate_recording_rotations(config: LlamaConfig, prompt_len: int, new_tokens: int):
    """Run generate on one prompt; cos and sin [prompt_len + new_tokens - 1, head_dim] as the model computed them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    steps = []
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, output: steps.append(output))
    prompt = 1 + torch.arange(prompt_len)[None] % (config.vocab_size - 1)  # never the pad token, which is masked
    model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return torch.cat([cos[0] for cos, _ in steps]), torch.cat([sin[0] for _, sin in steps])


def lone_sequence(prompt_len: int, new_tokens: int):
    positions = torch.arange(prompt_len + new_tokens - 1)
    return positions, torch.clamp(positions + 1, min=prompt_len)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt_len", "new_tokens"),
    [
        pytest.param(10, 4, id="short"),
        pytest.param(ORIGINAL_LEN - 3, 8, id="crossing-original-length"),
        pytest.param(MAX_POSITIONS - 3, 8, id="crossing-max-positions"),
        pytest.param(MAX_POSITIONS + 9, 4, id="long-prompt"),
    ],
)
def test_cos_sin_are_those_of_generate(kind, prompt_len, new_tokens):
    config = make_config(kind)
    expected_cos, expected_sin = generate_recording_rotations(config, prompt_len, new_tokens)
    tables = RotaryTables(config, "cpu", torch.float32, max_model_len=96)
    cos, sin = tables.cos_sin(*lone_sequence(prompt_len, new_tokens))
    assert cos.dtype == torch.float32
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_the_batch(kind):
    tables = RotaryTables(make_config(kind), "cpu", torch.float32, max_model_len=96)
    sequences = [lone_sequence(prompt_len, 5) for prompt_len in (7, 22, 62, 80)]
    alone = [tables.cos_sin(*sequence) for sequence in sequences]
    mixed = torch.randperm(sum(len(p) for p, _ in sequences), generator=torch.Generator().manual_seed(1))
    positions, context_lens = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    together = tables.cos_sin(positions[mixed], context_lens[mixed])
    for of_all, of_each in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(of_all, torch.cat(of_each)[mixed])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_context_length_matters_where_it_should(kind):
    tables = RotaryTables(make_config(kind), "cpu", torch.float32, max_model_len=96)
    position = torch.tensor([5])
    short, _ = tables.cos_sin(position, torch.tensor([10]))
    long, _ = tables.cos_sin(position, torch.tensor([90]))
    assert not torch.allclose(short, long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_is_the_rotation_of_transformers(dtype):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(9, 4, HEAD_DIM, generator=generator).to(dtype)
    k = torch.randn(9, 2, HEAD_DIM, generator=generator).to(dtype)
    positions = torch.arange(9)
    tables = RotaryTables(make_config("llama3"), "cpu", dtype)
    cos, sin = tables.cos_sin(positions, positions + 1)
    assert cos.dtype == dtype
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(tables.apply(q, cos, sin), expected_q)
    assert torch.equal(tables.apply(k, cos, sin), expected_k)


def test_apply_takes_wider_tables_than_its_input():
    x = torch.randn(3, 2, HEAD_DIM, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    positions = torch.arange(3)
    wide = RotaryTables(make_config("yarn"), "cpu", torch.float32)
    narrow = RotaryTables(make_config("yarn"), "cpu", torch.bfloat16)
    rotated = wide.apply(x, *wide.cos_sin(positions, positions + 1))
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, narrow.apply(x, *narrow.cos_sin(positions, positions + 1)))


def test_head_dim_of_its_own():
    config = make_config("default", head_dim=32)
    tables = RotaryTables(config, "cpu", torch.float32)
    cos, _ = tables.cos_sin(torch.tensor([3]), torch.tensor([4]))
    assert cos.shape == (1, 32)
    assert cos[0, 0].item() == pytest.approx(math.cos(3.0))
    assert cos[0, 17].item() == pytest.approx(math.cos(3.0 * 1000.0 ** (-1 / 16)))


def test_unknown_kind_is_refused():
    config = make_config("default")
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1000.0}
    with pytest.raises(UserError, match=r"rope_type='spiral': must be one of default, linear"):
        RotaryTables(config, "cpu", torch.float32)


def test_partial_rotation_is_refused():
    config = make_config("linear")
    config.rope_parameters["partial_rotary_factor"] = 0.5
    with pytest.raises(UserError, match="head_dim=16: RoPE must rotate whole heads"):
        RotaryTables(config, "cpu", torch.float32)
