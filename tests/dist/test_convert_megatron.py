"""Checkpoints written for Megatron-core are loaded by Megatron-core itself, and its own are read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from transformers import LlamaForCausalLM

from harness import run_ranks
from models import make_llama
from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.checkpoint.megatron import MegatronReader
from seesaw_ds.checkpoint.parts import units_of
from seesaw_ds.shapes import model_shape, read_hf_config


@contextmanager
def megatron_model(folder: Path) -> Iterator[GPTModel]:
    """A GPTModel of the sizes in the folder's config.json, split over all ranks, with weights of no meaning."""
    shape = model_shape(read_hf_config(folder))
    parallel_state.initialize_model_parallel(dist.get_world_size())
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=256,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )
    yield model.eval()
    parallel_state.destroy_model_parallel()


def load_and_compare(folder: Path, source: Path) -> None:
    """Load `folder` by Megatron-core; every parameter of this rank must be its slice of `source`."""
    with megatron_model(folder) as model:
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        shape = model_shape(read_hf_config(folder))
        tensors = load_file(source / "model.safetensors")
        tp, rank = dist.get_world_size(), dist.get_rank()

        def rows(name: str) -> torch.Tensor:
            return tensors[name].chunk(tp)[rank]

        for layer, block in enumerate(model.decoder.layers):
            prefix = f"model.layers.{layer}."
            q, k, v = (rows(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
            by_head = [part.view(shape.num_kv_heads // tp, -1, shape.hidden_size) for part in (q, k, v)]
            assert torch.equal(block.self_attention.linear_qkv.weight, torch.cat(by_head, 1).flatten(0, 1))
            o = tensors[prefix + "self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
            assert torch.equal(block.self_attention.linear_proj.weight, o)
            gate, up = (rows(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up"))
            assert torch.equal(block.mlp.linear_fc1.weight, torch.cat((gate, up)))
            down = tensors[prefix + "mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
            assert torch.equal(block.mlp.linear_fc2.weight, down)
            assert torch.equal(block.input_layernorm.weight, tensors[prefix + "input_layernorm.weight"])
            assert torch.equal(block.pre_mlp_layernorm.weight, tensors[prefix + "post_attention_layernorm.weight"])
        assert torch.equal(model.decoder.final_layernorm.weight, tensors["model.norm.weight"])
        assert torch.equal(model.embedding.word_embeddings.weight, rows("model.embed_tokens.weight"))
        if not shape.tie_word_embeddings:
            assert torch.equal(model.output_layer.weight, rows("lm_head.weight"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_loads_what_was_converted(tmp_path, tp, tied):
    make_llama(tmp_path / "hf", num_hidden_layers=3, tie_word_embeddings=tied)
    convert(Conversion(tmp_path / "hf", tmp_path / "megatron", "megatron", quiet=True))
    run_ranks(tp, load_and_compare, tmp_path / "megatron", tmp_path / "hf")


def logits_match(folder: Path, source: Path) -> None:
    # Megatron-core expects a CUDA device: for its rotary frequencies, and for the dropout that is off here.
    with (
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=SimpleNamespace(fork=nullcontext)),
        megatron_model(folder) as model,
        torch.no_grad(),
    ):
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        tokens = torch.tensor([[5, 17, 99, 3, 64, 2, 40]])
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        masked = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
        expected = LlamaForCausalLM.from_pretrained(source).eval()(tokens).logits
        torch.testing.assert_close(model(tokens, positions, masked), expected, rtol=1e-4, atol=1e-4)


def test_megatron_core_computes_the_same_logits(tmp_path):
    make_llama(tmp_path / "hf", num_hidden_layers=2)
    convert(Conversion(tmp_path / "hf", tmp_path / "megatron", "megatron", quiet=True))
    run_ranks(1, logits_match, tmp_path / "megatron", tmp_path / "hf")


def save_by_megatron_core(folder: Path, layers_apart: bool) -> dict[str, torch.Tensor]:
    """Write the model as Megatron-core does, but for its CUDA-only file writer; returns this rank's parameters."""
    with megatron_model(folder) as model:
        generator = torch.Generator().manual_seed(dist.get_rank())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layernorm" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True} if layers_apart else None)
        state = {name: value for name, value in state.items() if "_extra_state" not in name}
        apply_factories(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        dcp.save(mcore_to_pyt_state_dict(by_key, False), storage_writer=dcp.FileSystemWriter(folder), planner=planner)
        if dist.get_rank() == 0:
            config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
            (folder / "metadata.json").write_text(json.dumps(config))
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layers_apart", [False, True], ids=["stacked", "a tensor per layer"])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_megatron_core_wrote_is_read_and_converted(tmp_path, tp, layers_apart):
    make_llama(tmp_path / "hf", num_hidden_layers=3)
    folder = tmp_path / "megatron"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    ranks = run_ranks(tp, save_by_megatron_core, folder, layers_apart)

    shape = model_shape(read_hf_config(folder))
    reader = MegatronReader(folder, shape)
    read = {weight.key: reader.read(weight) for unit in units_of(shape) for weight in unit.weights}
    for layer in range(shape.num_layers):
        shards = [{name.removeprefix(f"decoder.layers.{layer}."): value for name, value in r.items()} for r in ranks]
        fused = [shard["mlp.linear_fc1.weight"].chunk(2) for shard in shards]
        expected = {
            "qkv": torch.cat([shard["self_attention.linear_qkv.weight"] for shard in shards]),
            "o": torch.cat([shard["self_attention.linear_proj.weight"] for shard in shards], dim=1),
            "gate.0": torch.cat([gate for gate, _ in fused]),
            "up.0": torch.cat([up for _, up in fused]),
            "down.0": torch.cat([shard["mlp.linear_fc2.weight"] for shard in shards], dim=1),
        }
        for name, matrix in expected.items():
            assert torch.equal(read[f"layers.{layer}.{name}"], matrix), (layer, name)
    assert torch.equal(read["embedding"], torch.cat([r["embedding.word_embeddings.weight"] for r in ranks]))
    assert torch.equal(read["head"], torch.cat([r["output_layer.weight"] for r in ranks]))

    convert(Conversion(folder, tmp_path / "back", "hf", verify=True, quiet=True))
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], read["head"])
    assert torch.equal(tensors["model.layers.2.mlp.up_proj.weight"], read["layers.2.up.0"])
