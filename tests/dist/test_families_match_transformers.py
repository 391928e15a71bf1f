"""Greedy float32 tokens of every family, under two pairs of layouts, against `transformers`."""

from __future__ import annotations

import pytest

from engine_run import run_engine
from family_models import SWITCHES, make_family
from seesaw_ds.model.families import FAMILIES
from workload import Workload, make_requests, run_config

NUM_REQUESTS = 12

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Workload:
    folder = tmp_path_factory.mktemp(request.param)
    return make_requests(folder, make_family(folder, request.param), NUM_REQUESTS)


@pytest.mark.parametrize("layouts", ["P2->T2", "T2P2->T4"])
def test_tokens_equal_transformers(family, layouts):
    outcome = run_engine(run_config(family.folder, layouts, num_host_kv_blocks=60), family.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == family.expected
    assert outcome.num_transitions >= 2


def test_every_family_has_a_small_model():
    assert SWITCHES.keys() == FAMILIES.keys()
