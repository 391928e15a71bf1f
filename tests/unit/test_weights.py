"""Cells of a checkpoint put together again are its tensors; dummy weights do not depend on the cut."""

from __future__ import annotations

import pytest
import torch

from cells import load_cells
from models import make_llama
from seesaw_ds.checkpoint.source import SafetensorsSource
from seesaw_ds.layout import Range, split_evenly
from seesaw_ds.model.build import table_cell
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.tensors import replicated_tensors
from seesaw_ds.model.weights import DummySource, WeightSource, read_table_cell
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

CUTS = [1, 2, 4, 8]
SIZES = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 301}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory) -> tuple[ModelShape, dict[str, torch.Tensor], SafetensorsSource]:
    """A model in several files: its shape, its tensors, and a source that reads it."""
    folder = tmp_path_factory.mktemp("model")
    model = make_llama(folder, max_shard_size="100KB", tie_word_embeddings=request.param, **SIZES)
    assert len(list(folder.glob("*.safetensors"))) > 1
    shape = model_shape(read_hf_config(folder))
    source = SafetensorsSource(shape, check_checkpoint(folder, shape), torch.float32)
    return shape, {name: tensor.detach() for name, tensor in model.state_dict().items()}, source


def whole_layer(
    source: WeightSource, shape: ModelShape, layer: int, num_cells: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A layer's cells as the matrices of a Hugging Face checkpoint, by their short names."""
    cells = load_cells(source, shape, layer, num_cells, dtype)
    qkv = torch.cat([cell["qkv"] for cell in cells])
    by_head = qkv.view(shape.num_kv_heads, shape.queries_per_kv_head + 2, shape.head_dim, shape.hidden_size)
    gates, ups = zip(*(cell["gate_up"].chunk(2) for cell in cells), strict=True)
    return {
        "q": by_head[:, :-2].reshape(-1, shape.hidden_size),
        "k": by_head[:, -2].reshape(-1, shape.hidden_size),
        "v": by_head[:, -1].reshape(-1, shape.hidden_size),
        "o": torch.cat([cell["o"] for cell in cells]).t(),
        "gate": torch.cat(gates),
        "up": torch.cat(ups),
        "down": torch.cat([cell["down"] for cell in cells]).t(),
    }


@pytest.mark.parametrize("num_cells", CUTS)
def test_cells_make_up_the_checkpoints_tensors(checkpoint, num_cells):
    shape, tensors, source = checkpoint
    for layer in range(shape.num_layers):
        for name, matrix in whole_layer(source, shape, layer, num_cells).items():
            module = "mlp" if name in ("gate", "up", "down") else "self_attn"
            assert torch.equal(matrix, tensors[f"model.layers.{layer}.{module}.{name}_proj.weight"]), (layer, name)


@pytest.mark.parametrize("num_cells", CUTS)
def test_table_cells_make_up_the_padded_tables(checkpoint, num_cells):
    shape, tensors, source = checkpoint
    spec = table_cell(shape, num_cells)
    for read, name in ((source.embedding, "model.embed_tokens.weight"), (source.head, "lm_head.weight")):
        table = torch.full((num_cells * spec.rows, spec.cols), torch.nan)
        for cell, target in enumerate(table.chunk(num_cells)):
            read_table_cell(read, shape.vocab_size, cell, target)
        assert torch.equal(table[: shape.vocab_size], tensors[name])
        assert not table[shape.vocab_size :].any()


def test_norms_are_read_whole_by_name(checkpoint):
    shape, tensors, source = checkpoint
    expected = {"final": tensors["model.norm.weight"]}
    for layer in range(shape.num_layers):
        for role, name in (("before_attention", "input"), ("before_ffn", "post_attention")):
            expected[f"{role}.{layer}"] = tensors[f"model.layers.{layer}.{name}_layernorm.weight"]
    assert sorted(replicated_tensors(shape)) == sorted(expected)
    for name, weight in expected.items():
        assert torch.equal(source.replicated(name), weight)


def test_weights_come_in_the_runs_dtype(tmp_path):
    model = make_llama(tmp_path)
    shape = model_shape(read_hf_config(tmp_path))
    source = SafetensorsSource(shape, check_checkpoint(tmp_path, shape), torch.bfloat16)
    down = whole_layer(source, shape, 0, 2, torch.bfloat16)["down"]
    assert torch.equal(down, model.model.layers[0].mlp.down_proj.weight.to(torch.bfloat16))
    assert source.replicated("final").dtype == source.embedding(Range(0, 3)).dtype == torch.bfloat16


def dummy_source(seed: int = 0, **changes) -> tuple[ModelShape, DummySource]:
    sizes = {
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 8,
        "intermediate_size": 96,
        "vocab_size": 2500,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    shape = ModelShape(**(sizes | changes))
    return shape, DummySource(shape, torch.float32, torch.device("cpu"), seed)


@pytest.mark.parametrize("num_cells", CUTS[1:])
def test_dummy_weights_are_the_same_model_in_every_cut(num_cells):
    shape, source = dummy_source()
    for layer in range(shape.num_layers):
        whole = whole_layer(source, shape, layer, 1)
        for name, matrix in whole_layer(source, shape, layer, num_cells).items():
            assert torch.equal(matrix, whole[name]), name


def test_dummy_matrices_differ_and_have_the_stated_deviation():
    shape, source = dummy_source()
    _, other = dummy_source(seed=1)
    matrices = [
        whole_layer(s, shape, layer, 2)[name] for s in (source, other) for layer in (0, 1) for name in ("gate", "up")
    ]
    matrices += [source.embedding(Range(0, 96)), source.head(Range(0, 96))]
    for i, matrix in enumerate(matrices):
        assert matrix.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert not any(torch.equal(matrix, later) for later in matrices[i + 1 :])
    assert torch.equal(source.replicated("final"), torch.ones(64))


def test_any_rows_of_a_dummy_table_are_the_same():
    shape, source = dummy_source()
    table = source.head(Range(0, shape.vocab_size))
    for rows in (*split_evenly(2500, 4), Range(1020, 1030), Range(2047, 2048), Range(7, 7)):
        assert torch.equal(source.head(rows), table[rows.start : rows.stop])


def test_dummy_head_is_the_embedding_when_they_are_tied():
    _, source = dummy_source(tie_word_embeddings=True)
    assert torch.equal(source.head(Range(5, 99)), source.embedding(Range(5, 99)))
