"""Checkpoints that cannot be used are refused before anything is loaded, with the file or tensor named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import make_llama
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import check_checkpoint, expected_tensors, index_checkpoint
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_llama(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy of a good model in one file, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shape_of(folder: Path) -> ModelShape:
    return model_shape(read_hf_config(folder))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the model's one file; None takes one out. Dots in names are written as double underscores."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)


def test_good_checkpoint_is_indexed(whole):
    entries = check_checkpoint(whole, shape_of(whole))
    tensors = load_file(whole / "model.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {entry.dtype for entry in entries.values()} == {"F32"}
    assert expected_tensors(shape_of(whole)).keys() == tensors.keys()


def test_checkpoint_in_several_files_is_indexed(tmp_path):
    make_llama(tmp_path, num_hidden_layers=2, max_shard_size="50KB")
    paths = {entry.path for entry in check_checkpoint(tmp_path, shape_of(tmp_path)).values()}
    assert paths == set(tmp_path.glob("*.safetensors"))
    assert len(paths) > 1


def test_tied_checkpoint_needs_no_head(tmp_path):
    make_llama(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    assert "lm_head.weight" not in check_checkpoint(tmp_path, shape_of(tmp_path))


def test_folder_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors file there; load_format=auto reads safetensors only"):
        index_checkpoint(model)


def test_missing_file_of_the_index_is_named(tmp_path):
    make_llama(tmp_path, num_hidden_layers=2, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"missing {gone.name}, which model.safetensors.index.json names"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_index_that_is_none_is_refused(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json cannot be read"):
        index_checkpoint(model)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "truncated: 0 bytes is too short for a safetensors file"),
        (5, "truncated: 5 bytes is too short for a safetensors file"),
        (100, "not a safetensors file, or truncated within its header"),
        (-1, r"truncated: \d+ bytes where its header needs \d+; fetch it again"),
    ],
)
def test_truncated_file_is_refused(model, size, message):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"{path.name}: {message}"):
        index_checkpoint(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://example.org/spec/v1\noid 1234\n", "not a safetensors file, or truncated within its header"),
        ((4).to_bytes(8, "little") + b"text and more", "not a safetensors file: its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file: its header is not a JSON object"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "not a safetensors file: its header describes no tensor at 'a'"),
        ((8).to_bytes(8, "little") + b'{"a":{}}', "not a safetensors file: its header describes no tensor at 'a'"),
    ],
)
def test_file_of_another_kind_is_refused(model, content, message):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"model.safetensors: {message}"):
        index_checkpoint(model)


def test_header_that_contradicts_itself_is_refused(model):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="tensor 'a' has 8 bytes where its shape needs 12"):
        index_checkpoint(model)


def test_tensor_in_two_files_is_refused(model):
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    with pytest.raises(UserError, match=r"is in both model.safetensors and other.safetensors"):
        index_checkpoint(model)


def test_missing_tensors_are_named(model):
    rewrite(model, model__norm__weight=None)
    with pytest.raises(UserError, match=r"weights missing: model.norm.weight$"):
        check_checkpoint(model, shape_of(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"weights missing: model.layers.2.self_attn.q_proj.weight, .* and 7 more$"):
        check_checkpoint(model, shape_of(model))


def test_tensors_without_a_place_are_named(model):
    rewrite(model, **{"model__layers__0__self_attn__q_proj__bias": torch.zeros(64)})
    with pytest.raises(UserError, match=r"has no place for: model.layers.0.self_attn.q_proj.bias; they may"):
        check_checkpoint(model, shape_of(model))


def test_tensors_that_say_nothing_new_are_let_through(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    rewrite(model, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.zeros(4)})
    assert "lm_head.weight" in check_checkpoint(model, shape_of(model))


def test_tensor_of_another_shape_is_named(model):
    rewrite(model, lm_head__weight=torch.zeros(127, 64))
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(127, 64\), config.json asks for \(128, 64\)"):
        check_checkpoint(model, shape_of(model))


def test_quantized_tensor_is_refused(model):
    rewrite(model, lm_head__weight=torch.zeros(128, 64, dtype=torch.int8))
    with pytest.raises(UserError, match=r"lm_head.weight is I8; only F64, F32, F16, BF16 are read"):
        check_checkpoint(model, shape_of(model))
