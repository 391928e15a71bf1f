"""Random, penalized and aborted sequences through the whole engine: what they get does not depend on how it runs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine_run import EngineOutcome, run_engine
from seesaw_ds.requests import FinishReason, SamplingParams, SequenceRequest
from workload import STOP_TOKEN_IDS, Workload, make_workload, run_config

VOCAB_SIZE = 301

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.8, logprobs=3),
    SamplingParams(top_k=20, min_p=0.05, presence_penalty=0.8),
    SamplingParams(frequency_penalty=0.5, repetition_penalty=1.3, logprobs=0),
    SamplingParams(top_p=0.9, top_k=50, logit_bias={7: 4.0, 9: -100.0}, min_tokens=12),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, presence_penalty=0.4, logprobs=5, min_tokens=6),
]


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return make_workload(tmp_path_factory.mktemp("model"), 20, seed=3)


def sampled_requests() -> list[SequenceRequest]:
    choice = random.Random(11)
    return [
        SequenceRequest(
            seq_id=seq_id,
            prompt_token_ids=tuple(choice.randrange(VOCAB_SIZE) for _ in range(choice.randint(5, 90))),
            params=replace(PARAMS[seq_id % len(PARAMS)], max_tokens=choice.randint(15, 40)),
            seed=choice.getrandbits(63),
            stop_token_ids=STOP_TOKEN_IDS[:5],
        )
        for seq_id in range(30)
    ]


def check_logprobs(workload: Workload, request: SequenceRequest, outcome: EngineOutcome) -> None:
    """Compare with one pass of transformers over the prompt and the tokens that were chosen."""
    result = outcome.results[request.seq_id]
    if request.params.logprobs is None:
        assert result.logprobs is None
        return
    tokens = torch.tensor([[*request.prompt_token_ids, *result.token_ids]])
    first = len(request.prompt_token_ids) - 1
    with torch.inference_mode():
        expected = workload.model(tokens).logits[0, first:-1].log_softmax(dim=-1)
    assert len(result.logprobs) == len(result.token_ids)
    for token_id, found, row in zip(result.token_ids, result.logprobs, expected, strict=True):
        assert found.token_logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(
            row.topk(request.params.logprobs).values.tolist(), abs=1e-4
        )
        assert [row[token].item() for token, _ in found.top] == pytest.approx(
            [value for _, value in found.top], abs=1e-4
        )


@pytest.fixture(scope="module")
def outcomes(workload) -> list[EngineOutcome]:
    """The same requests under three pairs of layouts, each with other pools and batches."""
    runs = [
        run_config(workload.folder, "P2->T2"),
        run_config(workload.folder, "T2", num_gpu_kv_blocks=90, num_host_kv_blocks=60, max_num_seqs=5),
        run_config(workload.folder, "D2P2->D2T2", kv_block_size=8, num_gpu_kv_blocks=24, max_num_batched_tokens=50),
    ]
    return [run_engine(run, sampled_requests()) for run in runs]


def test_sampled_tokens_do_not_depend_on_layouts_and_pools(workload, outcomes):
    assert outcomes[0].num_evictions >= 1
    assert len({(outcome.num_transitions, outcome.num_evictions) for outcome in outcomes}) > 1
    for request in sampled_requests():
        results = [outcome.results[request.seq_id] for outcome in outcomes]
        assert len({(result.token_ids, result.finish_reason) for result in results}) == 1, request.params
        for outcome in outcomes:
            check_logprobs(workload, request, outcome)


def test_sampling_parameters_take_effect_through_the_engine(outcomes):
    reasons = set()
    for request in sampled_requests():
        result = outcomes[0].results[request.seq_id]
        params = request.params
        assert params.min_tokens <= len(result.token_ids) <= params.max_tokens
        assert not set(result.token_ids[:-1]) & set(request.stop_token_ids)
        is_stopped = result.token_ids[-1] in request.stop_token_ids
        assert result.finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        reasons.add(result.finish_reason)
        assert not {token for token, bias in params.logit_bias.items() if bias == -100.0} & set(result.token_ids)
    assert reasons == set(FinishReason)


def test_another_seed_gives_other_tokens_to_random_requests_alone(workload, outcomes):
    requests = sampled_requests()[:12]
    again = run_engine(
        run_config(workload.folder, "P2->T2"), [replace(request, seed=request.seed + 1) for request in requests]
    )
    for request in requests:
        is_changed = again.results[request.seq_id].token_ids != outcomes[0].results[request.seq_id].token_ids
        assert is_changed == (request.params.temperature > 0)


@pytest.mark.parametrize("layouts", ["P2->T2", "T2->P2"])
def test_aborted_sequences_leave_the_others_alone(workload, layouts):
    # Stop strings make a sequence report its tokens one by one; the tokens of the last 10 requests run to their ends.
    watched = range(8, 20)
    requests = [
        replace(request, params=replace(request.params, stop=("never found",)))
        if request.seq_id in watched
        else request
        for request in workload.requests
    ]
    abort_after = {10: 1, 12: 3, 15: 9, 16: 1, 19: 17}
    outcome = run_engine(run_config(workload.folder, layouts), requests, abort_after)
    for seq_id, limit in abort_after.items():
        assert seq_id not in outcome.results
        tokens, _ = workload.expected[seq_id]
        seen = outcome.new_tokens[seq_id]
        assert limit <= len(seen) < len(tokens)
        assert tuple(seen) == tokens[: len(seen)]
    for seq_id, (tokens, reason) in enumerate(workload.expected):
        if seq_id not in abort_after:
            assert (outcome.results[seq_id].token_ids, outcome.results[seq_id].finish_reason) == (tokens, reason)
            assert (seq_id in outcome.new_tokens) <= (seq_id in watched)
    for stats in outcome.stats:
        assert stats.num_host_blocks_used == stats.num_gpu_blocks_used == 0
        assert stats.num_finished == len(requests) - len(abort_after)
