"""Greedy float32 tokens of the whole engine against `transformers`, under layouts of 2 and 4 ranks."""

from __future__ import annotations

import pytest

from engine_run import run_engine
from models import ROPE_SCALINGS
from seesaw_ds.requests import FinishReason
from workload import Workload, make_workload, run_config

NUM_REQUESTS = 48

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Workload:
    return make_workload(tmp_path_factory.mktemp("four-layers"), NUM_REQUESTS)


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory) -> Workload:
    return make_workload(
        tmp_path_factory.mktemp("five-layers"),
        NUM_REQUESTS,
        num_hidden_layers=5,
        tie_word_embeddings=True,
        rope_parameters=ROPE_SCALINGS["llama3"],
    )


def check_layouts(workload: Workload, layouts: str, weight_reshard: str, mixed_steps: bool) -> None:
    run = run_config(workload.folder, layouts, weight_reshard=weight_reshard, mixed_steps=mixed_steps)
    is_one_phase = run.layout_pair.is_static and mixed_steps
    outcome = run_engine(run, workload.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == workload.expected
    assert outcome.num_transitions >= (0 if is_one_phase else 4)
    assert outcome.num_evictions >= 1
    for stats in outcome.stats:
        assert stats.num_host_blocks_used == stats.num_gpu_blocks_used == 0


def test_requests_end_at_stop_tokens_and_at_their_length(four_layers, five_layers):
    for workload in (four_layers, five_layers):
        reasons = [reason for _, reason in workload.expected]
        assert min(reasons.count(reason) for reason in FinishReason) >= 8


@pytest.mark.parametrize("weight_reshard", ["exchange", "host"])
@pytest.mark.parametrize(
    "layouts", ["P2->T2", "T2->P2", "P2->P2", "T2", "P4->T4", "T2P2->T4", "P4->T2P2", "D2P2->D2T2"]
)
def test_tokens_equal_transformers(four_layers, layouts, weight_reshard):
    check_layouts(four_layers, layouts, weight_reshard, mixed_steps=True)


@pytest.mark.parametrize("mixed_steps", [True, False])
@pytest.mark.parametrize("layouts", ["P2->T2", "T2->P2", "P4->T2P2", "D2P2->D2T2"])
def test_tokens_equal_transformers_with_weights_that_come_early(four_layers, layouts, mixed_steps):
    run = run_config(
        four_layers.folder, layouts, mixed_steps=mixed_steps, max_num_seqs=48, num_gpu_kv_blocks=6000
    )
    outcome = run_engine(run, four_layers.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == four_layers.expected
    assert outcome.preloaded_bytes > 0
    assert outcome.num_evictions == 0


@pytest.mark.parametrize("layouts", ["P2->T2", "P2", "T2P2->T4"])
def test_tokens_equal_transformers_with_separated_phases(four_layers, layouts):
    check_layouts(four_layers, layouts, "exchange", mixed_steps=False)


@pytest.mark.parametrize("weight_reshard", ["exchange", "host"])
@pytest.mark.parametrize("layouts", ["P2->T2", "P4->T4", "P2[1,4]->T2", "P4[1,2,1,1]->T2P2[4,1]"])
def test_tokens_equal_transformers_with_stages_of_unequal_depth(five_layers, layouts, weight_reshard):
    check_layouts(five_layers, layouts, weight_reshard, mixed_steps=True)


@pytest.mark.parametrize("layouts", ["P2[4,1]", "P2->P2[4,1]"])
def test_tokens_equal_transformers_with_one_pipeline_of_unequal_stages(five_layers, layouts):
    check_layouts(five_layers, layouts, "exchange", mixed_steps=True)
