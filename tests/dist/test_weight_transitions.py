"""Every layer's parameters after ten transitions of a real engine, bit for bit against the checkpoint's tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from engine_run import build_cpu_engine
from harness import run_ranks
from seesaw_ds.config import RunConfig
from seesaw_ds.layout import LayoutPair, Phase, Range, split_evenly
from seesaw_ds.model.decoder import DecoderStage
from seesaw_ds.worker.setup import Engine
from workload import make_model, run_config

NUM_KV_HEADS, HEAD_DIM, QUERIES_PER_KV_HEAD, FFN_SIZE = 8, 8, 2, 96


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    folders = {num_layers: tmp_path_factory.mktemp(f"layers-{num_layers}") for num_layers in (4, 5)}
    for num_layers, folder in folders.items():
        make_model(folder, num_hidden_layers=num_layers, tie_word_embeddings=num_layers == 4)
    return folders


def rows(ranges: Range, scale: int) -> slice:
    return slice(ranges.start * scale, ranges.stop * scale)


def layer_matrices(
    tensors: dict[str, torch.Tensor], layer: int, layouts: LayoutPair, phase: Phase, tp_rank: int
) -> dict[str, torch.Tensor]:
    """What a rank's matrices must be: cut by hand from the checkpoint, without the engine's loader and plan."""
    prefix = f"model.layers.{layer}."
    heads = split_evenly(NUM_KV_HEADS, layouts[phase].tp)[tp_rank]
    ffn = split_evenly(FFN_SIZE, layouts[phase].tp)[tp_rank]
    q, k, v, o = (tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo")
    gate, up, down = (tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    qkv = []
    for head in heads.indices():
        one = Range(head, head + 1)
        qkv += [q[rows(one, QUERIES_PER_KV_HEAD * HEAD_DIM)], k[rows(one, HEAD_DIM)], v[rows(one, HEAD_DIM)]]
    num_cells = layouts.cells_per_layer // layouts[phase].tp
    cells = [rows(cell, 1) for cell in split_evenly(ffn.size, num_cells)]
    gate, up = gate[rows(ffn, 1)], up[rows(ffn, 1)]
    return {
        "qkv": torch.cat(qkv),
        "o": o[:, rows(heads, QUERIES_PER_KV_HEAD * HEAD_DIM)],
        "gate_up": torch.cat([part[cell] for cell in cells for part in (gate, up)]),
        "down": down[:, rows(ffn, 1)],
    }


def check_layers(engine: Engine, tensors: dict[str, torch.Tensor], layouts: LayoutPair, phase: Phase) -> int:
    """Compare the stage's layers in `phase`; returns the bytes of their matrices."""
    stage = engine.stages[phase]
    tp_rank = engine.state[phase].coords.tp
    num_bytes = 0
    for layer, module in zip(stage.layer_range.indices(), stage.layers, strict=True):
        for name, expected in layer_matrices(tensors, layer, layouts, phase, tp_rank).items():
            weight = getattr(module if name in ("qkv", "o") else module.ffn, name).weight
            assert torch.equal(weight, expected), (phase, layer, name)
            num_bytes += weight.nbytes
        prefix = f"model.layers.{layer}."
        assert torch.equal(module.before_attention.weight, tensors[prefix + "input_layernorm.weight"])
        assert torch.equal(module.before_ffn.weight, tensors[prefix + "post_attention_layernorm.weight"])
    return num_bytes


def check_vocabulary(engine: Engine, tensors: dict[str, torch.Tensor], phase: Phase) -> None:
    """Compare embedding and LM head, with their padding of zeros."""
    stage, groups = engine.stages[phase], engine.state[phase]
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    assert (stage.embedding is not None) == groups.is_first_stage
    assert (stage.head is not None) == groups.is_last_stage
    for module, table in ((stage.embedding, embedding), (stage.head, head)):
        if module is not None:
            padding = -table.shape[0] % math.lcm(*(engine.state[phase].layout.tp for phase in Phase))
            padded = torch.cat((table, torch.zeros(padding, table.shape[1])))
            assert torch.equal(module.weight, padded.chunk(groups.layout.tp)[groups.coords.tp])


def table_bytes(stage: DecoderStage) -> int:
    """Bytes of a stage's embedding and LM head, counted once where they are the same memory."""
    weights = [module.weight for module in (stage.embedding, stage.head) if module is not None]
    return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def transit_ten_times(run: RunConfig) -> tuple[int, int, int]:
    """Returns the bytes that came to this rank, its arena's, and what the memory plan has for the largest arena."""
    layouts = run.layout_pair
    tensors = load_file(Path(run.model) / "model.safetensors")
    engine = build_cpu_engine(run)
    matrix_bytes = {Phase.PREFILL: check_layers(engine, tensors, layouts, Phase.PREFILL)}
    addresses = {phase: [p.data_ptr() for p in engine.stages[phase].parameters()] for phase in Phase}
    phase = Phase.PREFILL
    num_bytes = 0
    for _ in range(10):
        phase = phase.other
        num_bytes += engine.reshard.run(phase)
        matrix_bytes[phase] = check_layers(engine, tensors, layouts, phase)
        check_vocabulary(engine, tensors, phase)
    assert engine.layers.arena.nbytes == max(matrix_bytes.values())
    assert engine.tables.arena.nbytes == max(map(table_bytes, engine.stages.values()))
    for phase, stage in engine.stages.items():
        assert addresses[phase] == [parameter.data_ptr() for parameter in stage.parameters()]
    dist.barrier()
    engine.close()
    return num_bytes, engine.layers.arena.nbytes, engine.pool_sizes.device.weights


def transit_with_preloads(run: RunConfig) -> list[int]:
    """Ten transitions, before each to decode one more round of the exchange; returns the bytes put into slots early."""
    tensors = load_file(Path(run.model) / "model.safetensors")
    engine = build_cpu_engine(run)
    preload = engine.preload
    assert preload is not None
    size = preload.size
    block_ids = list(range(run.num_gpu_kv_blocks))[::-1]
    early_bytes = []
    for num_rounds in range(5):
        num_rounds = min(num_rounds, size.num_rounds)
        preload.begin(num_rounds, block_ids[: num_rounds * size.round_blocks])
        for _ in range(12 * num_rounds):  # enough to start them
            preload.advance()
        before = preload.num_bytes
        for phase in (Phase.DECODE, Phase.PREFILL):
            engine.reshard.run(phase)
            check_layers(engine, tensors, run.layout_pair, phase)
            check_vocabulary(engine, tensors, phase)
        early_bytes.append(preload.num_bytes - before)
    dist.barrier()
    engine.close()
    return early_bytes


@pytest.mark.parametrize(
    "layouts", ["P2->T2", "T2->P2", "P4->T4", "P4->T2P2", "T2P2->T4", "P2[1,4]->T2", "P4[1,1,2,1]->T2P2[4,1]"]
)
def test_parameters_are_the_loaded_ones_after_preloads(models, layouts):
    # Blocks of 4 tokens hold less than a cell's tensors, and those of one layer less than those of four.
    run = run_config(models[5], layouts, num_gpu_kv_blocks=2000)
    by_rank = run_ranks(run.layout_pair.world_size, transit_with_preloads, run)
    early_bytes = [sum(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
    assert early_bytes[0] == 0
    assert early_bytes[1] > 0
    assert early_bytes == sorted(early_bytes)


@pytest.mark.parametrize(
    ("layouts", "num_layers", "weight_reshard"),
    [
        *((layouts, 5, "exchange") for layouts in ("P2->T2", "T2->P2", "P2->P2", "T2", "P4->T4", "T2P2->T4")),
        *((layouts, 5, "exchange") for layouts in ("P4->T2P2", "D2P2->D2T2")),
        *((layouts, 5, "host") for layouts in ("P2->T2", "T2->P2", "T2", "T2P2->T4", "P4->T4", "D2P2->D2T2")),
        *((layouts, 5, "exchange") for layouts in ("P2[1,4]->T2", "P2->P2[4,1]", "P4[1,1,2,1]->T2P2[4,1]")),
        ("P4[1,1,2,1]->T2P2[4,1]", 5, "host"),
        ("P2->T2", 4, "exchange"),
        ("P4->T4", 4, "exchange"),
        ("P4->T2P2", 4, "host"),
    ],
)
def test_parameters_are_the_loaded_ones_after_ten_transitions(models, layouts, num_layers, weight_reshard):
    run = run_config(models[num_layers], layouts, weight_reshard=weight_reshard)
    received_bytes, arena_bytes, planned_bytes = zip(
        *run_ranks(run.layout_pair.world_size, transit_ten_times, run), strict=True
    )
    assert all(num_bytes > 0 for num_bytes in received_bytes) != run.layout_pair.is_static
    assert set(planned_bytes) == {max(arena_bytes)}
