"""The engine run from a cells folder: the tokens of `transformers`, and layouts that the cells cannot make refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_run import run_engine
from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.engine.preflight import check_run
from seesaw_ds.errors import UserError
from workload import Workload, make_workload, run_config

NUM_REQUESTS = 8


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return make_workload(tmp_path_factory.mktemp("model"), NUM_REQUESTS)


@pytest.fixture(scope="module")
def cells(workload) -> Path:
    folder = workload.folder.with_name(workload.folder.name + "-cells")
    convert(Conversion(workload.folder, folder, "cells", max_tp=4, quiet=True))
    return folder


@pytest.mark.parametrize(("layouts", "weight_reshard"), [("P2->T2", "exchange"), ("P4->T4", "host")])
def test_tokens_from_cells_equal_transformers(workload, cells, layouts, weight_reshard):
    outcome = run_engine(run_config(cells, layouts, weight_reshard=weight_reshard), workload.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == workload.expected


def test_layouts_finer_than_the_cells_are_refused_before_anything_is_loaded(cells, tmp_path):
    (tmp_path / "in.jsonl").touch()
    paths = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    check_run(run_config(cells, "P4->T4", **paths), 4)
    with pytest.raises(UserError, match=r"cut into 4 cells, of which these layouts cannot make 8; .*--max-tp"):
        check_run(run_config(cells, "T8", **paths), 8)
