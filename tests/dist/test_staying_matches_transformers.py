"""Greedy float32 tokens against `transformers` when sequences decode on in the prefill layout, for a while or to the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine_run import run_engine
from seesaw_ds.engine import scheduler_process
from seesaw_ds.engine.decode_layout import DecodeLayout
from seesaw_ds.plan.layout_choice import Choice
from seesaw_ds.sched.staying import LiveBatch
from workload import Workload, make_workload, run_config

NUM_REQUESTS = 48
NUM_LEFT = 8  # enough that they do not all end in steps that are under way

pytestmark = pytest.mark.timeout(240)


def never(batch: LiveBatch) -> int | None:
    return 0


def late(batch: LiveBatch) -> int | None:
    """With prompts left every other time at once; with none for the last few."""
    if batch.num_prompts_left:
        return 0 if batch.num_prompts_left % 2 else None
    return NUM_LEFT if batch.num_sequences > NUM_LEFT else None


class FixedChoice:
    def __init__(self, answer: Callable[[LiveBatch], int | None]) -> None:
        self.num_left_to_switch = answer

    def take_choices(self) -> list[Choice]:
        return []


def answer_always(monkeypatch: pytest.MonkeyPatch, answer: Callable[[LiveBatch], int | None]) -> None:
    """Have the ranks, which are forked, decide by `answer`."""

    class FixedLayout(DecodeLayout):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.choice = FixedChoice(answer)

    monkeypatch.setattr(scheduler_process, "DecodeLayout", FixedLayout)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Workload:
    return make_workload(tmp_path_factory.mktemp("four-layers"), NUM_REQUESTS)


@pytest.mark.parametrize("answer", [never, late])
@pytest.mark.parametrize("layouts", ["P2->T2", "T2->P2", "P4->T4", "T2P2->T4", "D2P2->D2T2"])
def test_tokens_equal_transformers_when_sequences_stay(four_layers, monkeypatch, layouts, answer):
    answer_always(monkeypatch, answer)
    outcome = run_engine(run_config(four_layers.folder, layouts, hardware="cpu"), four_layers.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == four_layers.expected
    if answer is never:
        assert outcome.num_transitions == 0
    else:
        assert outcome.num_transitions >= 1
    for stats in outcome.stats:
        assert stats.num_host_blocks_used == stats.num_gpu_blocks_used == 0


@pytest.mark.parametrize("answer", [never, late])
@pytest.mark.parametrize("layouts", ["P2->T2", "P4->T2P2"])
def test_weights_that_come_early_may_be_needed_later_or_never(four_layers, monkeypatch, layouts, answer):
    answer_always(monkeypatch, answer)
    run = run_config(four_layers.folder, layouts, hardware="cpu", max_num_seqs=48, num_gpu_kv_blocks=6000)
    outcome = run_engine(run, four_layers.requests)
    found = [(outcome.results[i].token_ids, outcome.results[i].finish_reason) for i in range(NUM_REQUESTS)]
    assert found == four_layers.expected
    assert (outcome.num_transitions, outcome.preloaded_bytes > 0) == ((0, False) if answer is never else (1, True))
