"""A last stage whose last layer goes on with some rows alone: for them it gives what a run of all tokens gives."""

from __future__ import annotations

import pytest
import torch

from stages import prepare

SAMPLED = [0, 1, 14, 15]


@pytest.mark.parametrize("rows", [SAMPLED, [5]], ids=["sampled", "one"])
@pytest.mark.parametrize(("layouts", "pp_rank"), [("T1", 0), ("P2[3,1]", 1)])
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"],
)
def test_rows_are_those_of_the_whole_micro_batch(tmp_path, architecture, layouts, pp_rank, rows):
    stage, batch = prepare(tmp_path, architecture, layouts, pp_rank)
    of_all, kv_of_all = batch.run(stage, None)
    of_rows, kv = batch.run(stage, rows)
    assert of_all.shape == batch.hidden.shape
    torch.testing.assert_close(of_rows, of_all[rows])
    assert torch.equal(kv, kv_of_all)
    assert not torch.equal(kv, batch.kv[: len(stage.layers)])


def test_a_stage_that_another_follows_goes_on_with_all_tokens(tmp_path):
    stage, batch = prepare(tmp_path, "LlamaForCausalLM", "P2", 0)
    with pytest.raises(AssertionError, match="the next stage needs all tokens"):
        batch.run(stage, SAMPLED)
