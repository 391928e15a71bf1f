"""Every conversion keeps every bit; cells read for the engine are those of the Hugging Face folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cells import load_cells
from family_models import make_family
from models import make_llama
from seesaw_ds.checkpoint.cell_layout import cell_name, cell_sizes, check_cells, choose_num_cells, is_cells_folder
from seesaw_ds.checkpoint.cells import stored_cells
from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.checkpoint.formats import FORMATS, detect_format
from seesaw_ds.checkpoint.hf import HFReader, HFWriter
from seesaw_ds.checkpoint.manifest import read_manifest
from seesaw_ds.checkpoint.megatron_names import NAMES
from seesaw_ds.checkpoint.parts import units_of
from seesaw_ds.checkpoint.source import CellsSource, SafetensorsSource
from seesaw_ds.errors import UserError
from seesaw_ds.layout import Range
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.families import FAMILIES
from seesaw_ds.model.tensors import expected_tensors, replicated_tensors
from seesaw_ds.model.weights import cell_tensors
from seesaw_ds.reshard.plan import CellId
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "special_tokens_map.json": "{}",
}


def run(src: Path, dst: Path, to: str, **options: object) -> Path:
    convert(Conversion(src, dst, to, jobs=2, quiet=True, **options))
    return dst


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def shape_of(folder: Path) -> ModelShape:
    return model_shape(read_hf_config(folder))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory) -> dict[str, Path]:
    """A model in all three formats, by format; the Hugging Face folder has several files and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_llama(folder / "hf", max_shard_size="100KB", num_hidden_layers=3, tie_word_embeddings=request.param)
    for name, text in COMPANIONS.items():
        (folder / "hf" / name).write_text(text)
    (folder / "hf" / "additional_chat_templates").mkdir()
    (folder / "hf" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "hf" / "training_args.bin").write_bytes(b"not ours")
    return {to: run(folder / "hf", folder / to, to, verify=True) if to != "hf" else folder / "hf" for to in FORMATS}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_every_direction_and_back_keeps_every_bit(model, tmp_path, first, second):
    there = run(model[first], tmp_path / "there", second, verify=True)
    assert detect_format(there) == second
    back = run(run(there, tmp_path / "first", first), tmp_path / "hf", "hf") if first != "hf" else there
    back = run(back, tmp_path / "back", "hf") if detect_format(back) != "hf" else back
    expected, found = tensors_of(model["hf"]), tensors_of(back)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("to", ["megatron", "cells"])
def test_tokenizer_templates_and_configs_travel(model, to):
    for name in (*COMPANIONS, "config.json", "generation_config.json", "additional_chat_templates/tools.jinja"):
        assert (model[to] / name).read_bytes() == (model["hf"] / name).read_bytes()
    assert not (model[to] / "training_args.bin").exists()
    assert not list(model[to].parent.glob("*.partial"))


def test_manifest_has_the_sources_hashes_and_a_checksum_of_every_weight(model):
    manifest = read_manifest(model["cells"])
    assert (manifest.format, manifest.source_format, manifest.num_cells) == ("cells", "hf", 4)
    files = sorted(model["hf"].glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(manifest.source_files) == [path.name for path in files]
    for path in files:
        assert manifest.source_files[path.name].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert manifest.source_files[path.name].bytes == path.stat().st_size
    keys = {weight.key for unit in units_of(shape_of(model["hf"])) for weight in unit.weights}
    assert manifest.weights.keys() == keys
    assert read_manifest(model["megatron"]).weights == manifest.weights  # of the weights, whatever the format


def test_transformers_loads_a_folder_converted_back(model, tmp_path):
    from transformers import LlamaForCausalLM

    back = run(model["cells"], tmp_path / "back", "hf")
    tokens = torch.tensor([[5, 17, 99, 3]])
    with torch.no_grad():
        logits = [LlamaForCausalLM.from_pretrained(folder)(tokens).logits for folder in (model["hf"], back)]
    assert torch.equal(*logits)


def test_large_checkpoints_are_several_files_with_an_index(model, tmp_path):
    shape, tensors = shape_of(model["hf"]), tensors_of(model["hf"])
    reader = HFReader(model["hf"], shape)
    writer = HFWriter(tmp_path, shape, reader.dtype, largest_file=100_000)
    for unit in reversed(units_of(shape)):
        writer.write(unit, ((weight, reader.read(weight)) for weight in unit.weights))
    writer.finish({})
    writer.close()
    reader.close()
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in paths] == [
        f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert check_checkpoint(tmp_path, shape).keys() == tensors.keys()
    written = tensors_of(tmp_path)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_cells_lie_one_after_the_other(model):
    num_cells, stored = stored_cells(model["cells"], shape_of(model["cells"]))
    assert num_cells == 4
    for layer in range(3):
        names = [cell_name(layer, cell, name) for cell in range(4) for name in ("qkv", "o", "gate_up", "down")]
        for name, next_name in itertools.pairwise(names):
            end = stored[name].offset + math.prod(stored[name].size) * stored[name].dtype.itemsize
            assert (stored[next_name].path, stored[next_name].offset) == (stored[name].path, end)
    assert stored["embedding"].offset % 4096 == 0


def check_source(cells: Path, hf: Path, num_cells: int) -> None:
    """What the engine reads from a cells folder must be what it reads from the Hugging Face folder."""
    shape = shape_of(hf)
    expected = SafetensorsSource(shape, check_checkpoint(hf, shape), torch.float32)
    source = CellsSource(cells, shape, torch.float32)
    for layer in range(shape.num_layers):
        found, wanted = (load_cells(each, shape, layer, num_cells) for each in (source, expected))
        for cell in range(num_cells):
            for name, matrix in wanted[cell].items():
                assert torch.equal(found[cell][name], matrix), (layer, cell, name)
    for rows in (Range(0, shape.vocab_size), Range(5, 77), Range(128, 128)):
        assert torch.equal(source.embedding(rows), expected.embedding(rows))
        assert torch.equal(source.head(rows), expected.head(rows))
    for name in replicated_tensors(shape):
        assert torch.equal(source.replicated(name), expected.replicated(name)), name


@pytest.mark.parametrize("num_cells", [1, 2, 4])
def test_the_engine_reads_the_same_cells_as_from_hugging_face(model, num_cells):
    shape = shape_of(model["hf"])
    assert is_cells_folder(model["cells"])
    assert not is_cells_folder(model["hf"])
    assert check_cells(model["cells"], shape, num_cells) == 4
    check_source(model["cells"], model["hf"], num_cells)
    source = CellsSource(model["cells"], shape, torch.bfloat16)
    assert source.replicated("final").dtype == torch.bfloat16
    for cell, exact in zip(
        load_cells(source, shape, 0, num_cells, torch.bfloat16),
        load_cells(CellsSource(model["cells"], shape, torch.float32), shape, 0, num_cells),
        strict=True,
    ):
        assert all(torch.equal(matrix, exact[name].to(torch.bfloat16)) for name, matrix in cell.items())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_becomes_cells_and_back(tmp_path, architecture):
    hf = tmp_path / "hf"
    make_family(hf, architecture)
    cells = run(hf, tmp_path / "cells", "cells", verify=True)
    for num_cells in (1, 4):
        check_source(cells, hf, num_cells)
    expected, back = tensors_of(hf), tensors_of(run(cells, tmp_path / "back", "hf"))
    assert back.keys() == expected_tensors(shape_of(hf)).keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)
    kinds = {weight.kind for unit in units_of(shape_of(hf)) for weight in unit.weights}
    if kinds <= NAMES.keys():
        back = tensors_of(run(run(cells, tmp_path / "megatron", "megatron"), tmp_path / "again", "hf"))
        assert all(torch.equal(back[name], expected[name]) for name in back)
    else:
        with pytest.raises(UserError, match=f"{architecture}.*Megatron-core names are not known here"):
            run(cells, tmp_path / "megatron", "megatron")


def test_layouts_that_the_cells_cannot_make_are_refused(model):
    shape = shape_of(model["cells"])
    with pytest.raises(UserError, match=r"cut into 4 cells, of which these layouts cannot make 8; convert .*--max-tp"):
        check_cells(model["cells"], shape, 8)
    with pytest.raises(ValueError, match=r"num_cells=3: must divide the 4 cells"):
        CellsSource(model["cells"], shape, torch.float32).load({CellId(0, 0): {}}, 3, lambda done, total: None)


def test_names_and_shapes_are_those_of_the_engine(model):
    shape = shape_of(model["hf"])
    assert tensors_of(model["hf"]).keys() == expected_tensors(shape).keys()
    sizes = cell_sizes(units_of(shape)[1], 4)
    for piece in cell_tensors(shape, 4):
        assert sizes[cell_name(0, 3, piece.name)] == (piece.rows, piece.cols)


def test_max_tp_must_divide_kv_heads_and_ffn(model):
    shape = shape_of(model["hf"])
    assert [choose_num_cells(shape, t) for t in (None, 1, 2, 4)] == [4, 1, 2, 4]
    for max_tp in (3, 8, 0):
        with pytest.raises(UserError, match=rf"--max-tp {max_tp}: must divide num_key_value_heads=4"):
            choose_num_cells(shape, max_tp)


@pytest.mark.parametrize("to", FORMATS)
def test_dtype_is_cast_on_the_way(model, tmp_path, to):
    folder = run(model["hf"], tmp_path / to, to, dtype="bfloat16", verify=True)
    assert read_hf_config(folder)["dtype"] == "bfloat16"
    back = tensors_of(run(folder, tmp_path / "back", "hf"))
    for name, tensor in tensors_of(model["hf"]).items():
        assert torch.equal(back[name], tensor.to(torch.bfloat16)), name


def test_tied_head_and_buffers_in_old_files_are_left_out(tmp_path):
    make_llama(tmp_path / "hf", num_hidden_layers=1, tie_word_embeddings=True)
    tensors = tensors_of(tmp_path / "hf")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | head | buffer, tmp_path / "hf" / "model.safetensors")
    back = run(run(tmp_path / "hf", tmp_path / "megatron", "megatron"), tmp_path / "back", "hf")
    assert tensors_of(back).keys() == tensors.keys()
