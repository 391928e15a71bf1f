"""Settings: names, types, ranges, and the rules between settings, ranks and model."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from seesaw_ds.config import ALL_HOST_MEMORY, RunConfig, check_fit, dtype_name, max_model_len, parse_config
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair
from seesaw_ds.shapes import ModelShape

VALUES = {"model": "m", "input": "in.jsonl", "output": "out.jsonl", "layouts": "P2->T2"}

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=64,
    num_heads=24,
    num_kv_heads=12,
    head_dim=8,
    intermediate_size=72,
    vocab_size=128,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def test_settings_have_defaults_and_keep_what_is_given():
    run = parse_config(VALUES | {"kv_block_size": 4, "timeline": None, "seed": -3})
    assert run == RunConfig(**VALUES, kv_block_size=4, seed=-3)
    assert run.layout_pair == LayoutPair.parse("P2->T2")
    with pytest.raises(FrozenInstanceError):
        run.seed = 1


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, (256, 512)),
        ({"layouts": "auto"}, (1024, 8192)),
        ({"layouts": "auto", "max_num_seqs": 300}, (300, 8192)),
        ({"layouts": "auto", "max_num_batched_tokens": 512}, (1024, 512)),
        ({"max_num_seqs": 7}, (7, 512)),
    ],
)
def test_auto_layouts_may_take_more_than_fixed_ones_do_unless_told_otherwise(changes, most):
    run = parse_config(VALUES | changes)
    assert (run.max_num_seqs, run.max_num_batched_tokens) == most
    assert run.kv_offloading_size == (ALL_HOST_MEMORY if run.has_auto_layouts else 4.0)
    assert parse_config(VALUES | changes | {"kv_offloading_size": 3.0}).kv_offloading_size == 3.0


def test_whole_numbers_are_taken_where_fractions_are_asked_for():
    run = parse_config(VALUES | {"kv_offloading_size": 2, "gpu_memory_utilization": 1})
    assert (run.kv_offloading_size, run.gpu_memory_utilization) == (2.0, 1.0)
    assert isinstance(run.kv_offloading_size, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_blocksize": 4}, r"kv_blocksize=4: unknown setting; did you mean 'kv_block_size'\?"),
        ({"zzz": 1}, "zzz=1: unknown setting; known keys: model, input"),
        ({3: 1}, "3=1: unknown setting"),
        ({"kv_block_size": "16"}, "kv_block_size='16': must be int, not str"),
        ({"kv_block_size": True}, "kv_block_size=True: must be int, not bool"),
        ({"kv_block_size": 1.5}, "kv_block_size=1.5: must be int, not float"),
        ({"max_num_seqs": None}, "max_num_seqs=None: must be int, not NoneType"),
        ({"gpu_memory_utilization": False}, "gpu_memory_utilization=False: must be float, not bool"),
        ({"model": 3}, "model=3: must be str, not int"),
        ({"load_format": "gguf"}, "load_format='gguf': must be one of auto, dummy"),
        ({"dtype": "fp8"}, "dtype='fp8': must be one of auto, float32, bfloat16, float16"),
        ({"weight_reshard": "magic"}, "weight_reshard='magic': must be one of exchange, host"),
        ({"max_num_seqs": 0}, "max_num_seqs=0: must be at least 1"),
        ({"num_gpu_kv_blocks": -1}, "num_gpu_kv_blocks=-1: must be at least 1"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1: must be above 0 and at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan: must be above 0"),
        ({"kv_offloading_size": 0}, "kv_offloading_size=0.0: must be above 0"),
        ({"kv_offloading_size": float("nan")}, "kv_offloading_size=nan: must be above 0"),
        ({"kv_offloading_size": float("inf")}, "kv_offloading_size=inf: must be above 0 and finite"),
        ({"seed": 2**63}, "seed=9223372036854775808: must fit in 64 bits"),
        ({"layouts": "P2->T4"}, "both phases must use the same ranks"),
        ({"layouts": "T2P3->T3P2"}, "weight_reshard=exchange needs one tensor-parallel size to divide the other"),
    ],
)
def test_bad_setting_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(VALUES | changes)


def test_layouts_may_be_left_to_the_planner():
    run = parse_config(VALUES | {"layouts": "auto", "hardware": "a10"})
    assert run.has_auto_layouts
    assert not parse_config(VALUES).has_auto_layouts
    check_fit(run, SHAPE, 7)
    with pytest.raises(UserError, match="max_position_embeddings is 256"):
        check_fit(parse_config(VALUES | {"layouts": "auto", "max_model_len": 257}), SHAPE, 2)


def test_host_reload_takes_any_pair_of_layouts():
    assert not parse_config(VALUES | {"layouts": "T2P3->T3P2", "weight_reshard": "host"}).layout_pair.is_nested


@pytest.mark.parametrize("name", VALUES)
def test_missing_setting_is_named(name):
    with pytest.raises(UserError, match=f"{name}: missing; .*--set {name}="):
        parse_config({key: value for key, value in VALUES.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 4, r"needs 2 ranks, but 4 were launched; start with deepspeed --num_gpus 2"),
        ({"layouts": "P4->T4"}, 4, "4 pipeline stages need at least as many layers, but num_hidden_layers=3"),
        ({"layouts": "T8"}, 8, "num_key_value_heads=12 must be a multiple of 8"),
        ({"layouts": "T5"}, 5, "num_attention_heads=24 must be a multiple of 5"),
        ({"max_model_len": 257}, 2, "max_model_len=257: the model's max_position_embeddings is 256"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(changes, world_size, message):
    with pytest.raises(UserError, match=message):
        check_fit(parse_config(VALUES | changes), SHAPE, world_size)


def test_ffn_that_cannot_be_cut_is_refused():
    shape = ModelShape(**{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"intermediate_size": 70})
    with pytest.raises(UserError, match="intermediate_size=70 must be a multiple of 4"):
        check_fit(parse_config(VALUES | {"layouts": "T4"}), shape, 4)


@pytest.mark.parametrize("layouts", ["P2->T2", "P3->T3", "D2T4", "T12"])
def test_layouts_that_fit_are_taken(layouts):
    run = parse_config(VALUES | {"layouts": layouts, "max_model_len": 256})
    check_fit(run, SHAPE, run.layout_pair.world_size)


def test_model_decides_what_is_not_set():
    assert (max_model_len(parse_config(VALUES), SHAPE), dtype_name(parse_config(VALUES), SHAPE)) == (256, "bfloat16")
    run = parse_config(VALUES | {"max_model_len": 100, "dtype": "float32"})
    assert (max_model_len(run, SHAPE), dtype_name(run, SHAPE)) == (100, "float32")
