"""Weights are read into their place: every byte once, every bit kept, whatever the block sizes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import make_llama
from seesaw_ds.checkpoint import reading
from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.checkpoint.source import CellsSource, SafetensorsSource
from seesaw_ds.checkpoint.tensor_files import StoredTensor, read_index
from seesaw_ds.checkpoint.transpose import transpose
from seesaw_ds.errors import UserError
from seesaw_ds.layout import LayoutPair, Phase, Range
from seesaw_ds.model.build import load_layers
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.model.tensors import projections
from seesaw_ds.model.weights import cell_tensors
from seesaw_ds.reshard.arena import PlacedCells, WeightArena
from seesaw_ds.reshard.plan import plan_reshard
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def random_bits(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of every kind: NaNs with payloads, denormals and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    num_bytes = size[0] * size[1] * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(size)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = BITS[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("heights", [[64], [7], [2, 30, 8], [3, 4]])
def test_a_transpose_keeps_every_bit(dtype, heights):
    block = random_bits(33, sum(heights), dtype=dtype)
    wide = torch.zeros(sum(heights), 50, dtype=dtype)
    transpose(block, wide[:, 5:38].split(heights))
    assert same_bits(wide[:, 5:38], block.t())
    assert not wide[:, :5].any() and not wide[:, 38:].any()


@pytest.mark.parametrize("heights", [[64], [5, 4]])
def test_a_transpose_casts(heights):
    block = torch.randn(33, sum(heights), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    target = torch.zeros(sum(heights), 33)
    transpose(block, target.split(heights))
    assert torch.equal(target, block.t().float())


@pytest.fixture
def stored(tmp_path) -> tuple[StoredTensor, torch.Tensor]:
    """A matrix in a file, behind a tensor that puts it at an odd place."""
    matrix = random_bits(70, 44, dtype=torch.bfloat16)
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16), "matrix": matrix}, tmp_path / "f.safetensors")
    return read_index([tmp_path / "f.safetensors"])["matrix"], matrix


@pytest.mark.parametrize("largest_gap", [16 << 10, 0])
@pytest.mark.parametrize(("block_bytes", "piece_bytes"), [(3 << 20, 8 << 20), (6400, 6400), (640, 640)])
@pytest.mark.parametrize("reader", ["direct", "staged"])
def test_blocks_of_any_size_give_the_same(stored, monkeypatch, reader, block_bytes, piece_bytes, largest_gap):
    place, matrix = stored
    monkeypatch.setattr(reading, "BLOCK_ROWS", Range(32, 480))
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(reading, "LARGEST_GAP", largest_gap)
    if reader == "staged":
        monkeypatch.setattr(reading, "DirectReader", lambda files: reading.StagedReader(files, torch.device("cpu")))
    turned, rows = torch.zeros(30, 70, dtype=torch.bfloat16), torch.zeros(2, 20, 44, dtype=torch.bfloat16)
    progress = []
    reading.read_groups(
        [
            reading.transposed_pieces(place, 8, turned.split([6, 24])),
            reading.row_pieces(place, 11, rows[:, 3:18]),
        ],
        lambda *counts: progress.append(counts),
    )
    assert progress == [(1, 2), (2, 2)]
    assert same_bits(turned, matrix[:, 8:38].t())
    assert same_bits(rows[:, 3:18].flatten(0, 1), matrix[11:41])
    assert not rows[:, :3].any() and not rows[:, 18:].any()
    assert torch.equal(
        reading.read_rows(place, Range(3, 50), torch.float32).nan_to_num(), matrix[3:50].float().nan_to_num()
    )


def test_a_call_that_comes_back_early_is_made_up_for(stored, monkeypatch):
    place, matrix = stored
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, buffers[:5], offset))
    turned = torch.zeros(30, 70, dtype=torch.bfloat16)
    reading.read_groups([reading.transposed_pieces(place, 8, [turned])], lambda done, total: None)
    assert same_bits(turned, matrix[:, 8:38].t())


def test_parts_of_rows_are_read_by_few_calls(stored, monkeypatch):
    place, _ = stored
    calls: list[int] = []
    preadv = os.preadv

    def count(fd, buffers, offset):
        calls.append(len(buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    turned = torch.zeros(30, 70, dtype=torch.bfloat16)
    reading.read_groups([reading.transposed_pieces(place, 8, [turned])], lambda done, total: None)
    assert calls == [2 * 70 - 1]
    assert 2 * reading.BLOCK_ROWS.stop <= os.sysconf("SC_IOV_MAX")


def test_a_file_that_became_shorter_is_named(stored):
    place, _ = stored
    with place.path.open("r+b") as file:
        file.truncate(place.offset + 1000)
    with pytest.raises(UserError, match=r"f\.safetensors: ended before its last tensor; fetch it again"):
        reading.read_rows(place, Range(0, 70), torch.bfloat16)
    columns = reading.transposed_pieces(place, 8, [torch.zeros(30, 70, dtype=torch.bfloat16)])
    with pytest.raises(UserError, match=r"f\.safetensors: ended before its last tensor; fetch it again"):
        reading.read_groups([columns], lambda done, total: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of 4 layers and 4 KV heads, as Hugging Face folder and as cells for T=4."""
    hf = tmp_path_factory.mktemp("model") / "hf"
    make_llama(hf)
    cells = hf.parent / "cells"
    convert(Conversion(hf, cells, "cells", max_tp=4, jobs=1, quiet=True))
    return {"hf": hf, "cells": cells}


def open_source(folder: Path, shape: ModelShape) -> SafetensorsSource | CellsSource:
    if folder.name == "cells":
        return CellsSource(folder, shape, torch.float32)
    return SafetensorsSource(shape, check_checkpoint(folder, shape), torch.float32)


def load(folder: Path, layouts: str, rank: int) -> tuple[WeightArena, list[tuple[int, int]]]:
    shape, pair = model_shape(read_hf_config(folder)), LayoutPair.parse(layouts)
    plan = plan_reshard(pair, shape.num_layers)
    pieces = cell_tensors(shape, pair.cells_per_layer)
    arena = WeightArena(pieces, plan.num_slots[rank], torch.float32, torch.device("cpu"))
    progress: list[tuple[int, int]] = []
    load_layers(
        PlacedCells(plan, arena), rank, open_source(folder, shape), None, lambda *counts: progress.append(counts)
    )
    return arena, progress


@pytest.mark.parametrize("kind", ["hf", "cells"])
@pytest.mark.parametrize("layouts", ["P2->T2", "T2P2->T4", "T4"])
def test_the_ranks_together_read_every_byte_of_the_layers_once(folders, monkeypatch, kind, layouts):
    read: Counter[tuple[Path, int]] = Counter()
    read_piece = reading._Files.read

    def count(files, piece, block):
        width, item_bytes = piece.stored.size[1], piece.stored.dtype.itemsize
        for row, column in itertools.product(piece.rows.indices(), piece.columns.indices()):
            read[piece.stored.path, piece.stored.offset + (row * width + column) * item_bytes] += 1
        read_piece(files, piece, block)

    monkeypatch.setattr(reading._Files, "read", count)
    for rank in range(LayoutPair.parse(layouts).replica_size):
        load(folders[kind], layouts, rank)
    shape = model_shape(read_hf_config(folders[kind]))
    per_layer = sum(place.rows * place.columns for place in projections(shape, 0).values())
    assert len(read) == shape.num_layers * per_layer
    assert set(read.values()) == {1}


@pytest.mark.parametrize("layouts", ["P2->T2", "T2->P2", "T4"])
def test_an_arena_is_the_same_from_both_formats(folders, layouts):
    num_cells = LayoutPair.parse(layouts).cells_per_layer
    placement = plan_reshard(LayoutPair.parse(layouts), 4).placement[Phase.PREFILL]
    for rank in range(LayoutPair.parse(layouts).replica_size):
        (one, progress), (other, _) = load(folders["hf"], layouts, rank), load(folders["cells"], layouts, rank)
        assert progress[-1] == (len(placement[rank]), len(placement[rank]))
        assert progress == sorted(set(progress)) and 4 % num_cells == 0
        for spec, slot in itertools.product(one.cell_tensors, placement[rank].values()):
            assert torch.equal(one.cell(spec.name, slot), other.cell(spec.name, slot)), (spec.name, slot)
