"""The sampler: its random numbers, each rule against a plain reference, and that a row depends on itself alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from seesaw_ds.model import sampler, sampling_rng
from seesaw_ds.model.sampler import sample
from seesaw_ds.model.sampling_draw import TorchDraw
from seesaw_ds.model.sampling_filters import mask_min_p, mask_top_k, mask_top_k_top_p
from seesaw_ds.model.sampling_state import SamplingState
from seesaw_ds.requests import SamplingParams

VOCAB = 64
GREEDY = SamplingParams(temperature=0.0)


def random_logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def run(state, logits, slots, positions):
    return sample(logits, torch.tensor(slots), torch.tensor(positions), state, slots, TorchDraw())


def tokens_at(params, logits_row, positions, seed=7, **slot_options):
    """Sample one sequence at many positions at once: the same logits, in as many slots."""
    rows = len(positions)
    state = SamplingState(rows, logits_row.shape[0], "cpu")
    for slot in range(rows):
        state.set_slot(slot, params, seed, **slot_options)
    return run(state, logits_row.expand(rows, -1), list(range(rows)), list(positions)).token_ids


def processed_logits(monkeypatch, params, logits_row, position=0, **slot_options):
    """The logits that a greedy row's argmax sees."""
    seen = []
    argmax = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, dim: (seen.append(self.clone()), argmax(self, dim))[1])
    tokens_at(params, logits_row, [position], **slot_options)
    monkeypatch.undo()
    return seen[0][0]


# --- random numbers ---------------------------------------------------------------------------------------------------


def unsigned(tensor):
    return [value & (2**64 - 1) for value in tensor.flatten().tolist()]


@pytest.mark.parametrize(
    ("state", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_splitmix64_known_answers(state, outputs):
    got = sampling_rng.splitmix64(torch.tensor(state), torch.arange(4))
    assert unsigned(got) == outputs


def splitmix64_of_integers(state, index):
    mask = 2**64 - 1
    z = (state + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_token_bits_are_the_halves_of_the_stream():
    seeds, positions = [0, 12345, 2**64 - 1], [0, 3, 2**31]
    seed_tensor = torch.tensor([sampling_rng.seed_as_int64(seed) for seed in seeds])
    states = sampling_rng.stream_states(seed_tensor, torch.tensor(positions))
    bits = sampling_rng.token_bits(states, 7)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        state = splitmix64_of_integers(splitmix64_of_integers(seed, 0), position)
        outputs = [splitmix64_of_integers(state, i) for i in range(4)]
        halves = [half for output in outputs for half in (output & 0xFFFFFFFF, output >> 32)]
        assert [value & 0xFFFFFFFF for value in bits[row].tolist()] == halves[:7]


def test_token_bits_do_not_depend_on_vocab_size():
    states = sampling_rng.stream_states(torch.tensor([5, 6]), torch.tensor([0, 1]))
    assert torch.equal(sampling_rng.token_bits(states, 9), sampling_rng.token_bits(states, 1000)[:, :9])


def test_streams_differ_by_seed_and_position():
    seeds = torch.arange(-50, 50).repeat_interleave(100)
    positions = torch.arange(100).repeat(100)
    states = sampling_rng.stream_states(seeds, positions)
    assert len(set(states.tolist())) == 10_000


@pytest.mark.parametrize("axis", ["token", "position", "seed"])
def test_bits_are_uniform_and_independent(axis):
    n = 1 << 16
    counter, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    if axis == "token":
        bits = sampling_rng.token_bits(sampling_rng.stream_states(zeros[:1], zeros[:1]), n)[0]
    elif axis == "position":
        bits = sampling_rng.token_bits(sampling_rng.stream_states(zeros, counter), 1)[:, 0]
    else:
        bits = sampling_rng.token_bits(sampling_rng.stream_states(counter, zeros), 1)[:, 0]
    values = bits.numpy().view(np.uint32)
    # Chi-square with 255 degrees of freedom: mean 255, deviation 22.6; 370 is beyond five deviations.
    for byte in (values & 255, values >> 24):
        assert ((np.bincount(byte, minlength=256) - n / 256) ** 2 / (n / 256)).sum() < 370
    pairs = (values[:-1] >> 28).astype(np.int64) * 16 + (values[1:] >> 28)
    assert ((np.bincount(pairs, minlength=256) - (n - 1) / 256) ** 2 / ((n - 1) / 256)).sum() < 370
    ones = np.array([((values >> bit) & 1).mean() for bit in range(32)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / math.sqrt(n)


def test_gumbel_noise_has_its_mean_variance_and_range():
    states = sampling_rng.stream_states(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    noise = sampling_rng.gumbel_noise(states, 1 << 12).double()
    count = noise.numel()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57721566, abs=5 * 1.28 / math.sqrt(count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_gumbel_noise_is_finite_at_the_extreme_bits(monkeypatch):
    extremes = torch.tensor([[0, -1, 0x7FFFFFFF, -(2**31)]], dtype=torch.int32)
    monkeypatch.setattr(sampling_rng, "token_bits", lambda states, vocab_size: extremes)
    noise = sampling_rng.gumbel_noise(torch.zeros(1, dtype=torch.int64), 4)
    assert noise.isfinite().all()
    assert noise.max().item() == pytest.approx(32 * math.log(2), rel=1e-5)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
    ],
    ids=["plain", "cold", "hot-top-k", "top-p", "min-p"],
)
def test_tokens_follow_the_distribution(params):
    num_positions = 20_000
    logits = random_logits(1, vocab=16, seed=3, scale=1.5)[0]
    tokens = tokens_at(params, logits, range(num_positions))
    probabilities = reference_probabilities(logits.double().numpy(), params)
    observed = np.bincount(tokens.numpy(), minlength=16)
    assert (observed[probabilities == 0] == 0).all()
    kept = probabilities > 0
    expected = probabilities[kept] * num_positions
    # 15 degrees of freedom at most: 44.3 has probability 1e-4.
    assert ((observed[kept] - expected) ** 2 / expected).sum() < 44.3


def reference_probabilities(logits, params):
    """The distribution of the next token, in float64, straight from the definitions."""
    x = logits / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.min_p:
        p = np.where(p >= params.min_p * p.max(), p, 0.0)
    if params.top_k > 0:
        p = np.where(p >= np.sort(p)[::-1][min(params.top_k, len(p)) - 1], p, 0.0)
    p /= p.sum()
    if params.top_p < 1.0:
        best_first = np.sort(p)[::-1]
        p = np.where(p >= best_first[np.searchsorted(np.cumsum(best_first), params.top_p)], p, 0.0)
        p /= p.sum()
    return p


def test_neighbouring_positions_and_seeds_are_uncorrelated():
    logits = torch.zeros(2)
    by_seed = [tokens_at(SamplingParams(), logits, range(4000), seed=seed) for seed in (1, 2)]
    assert (by_seed[0] == by_seed[1]).double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert (by_seed[0][1:] == by_seed[0][:-1]).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_greedy_takes_the_best_and_the_lowest_of_equals():
    logits = torch.zeros(3, VOCAB, dtype=torch.bfloat16)
    logits[0, 9] = logits[0, 40] = 2.0
    logits[1, 63] = 1.0
    state = SamplingState(3, VOCAB, "cpu")
    for slot in range(3):
        state.set_slot(slot, GREEDY, slot)
    assert run(state, logits, [0, 1, 2], [0, 5, 9]).token_ids.tolist() == [9, 63, 0]


def test_a_temperature_near_zero_is_greedy():
    logits = random_logits(1)[0]
    params = SamplingParams(temperature=1e-9)
    assert set(tokens_at(params, logits, range(50)).tolist()) == {int(logits.argmax())}


def test_seeds_of_any_size():
    logits = torch.zeros(VOCAB)
    tokens = [tokens_at(SamplingParams(), logits, range(20), seed=seed).tolist() for seed in (-1, 2**64 - 1, 2**63)]
    assert tokens[0] == tokens[1] != tokens[2]


# --- a row depends on itself alone ------------------------------------------------------------------------------------

MIXED = [
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(top_k=3, top_p=0.5),
    SamplingParams(min_p=0.05, top_p=0.95),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(logit_bias={1: 4.0, 2: -100.0}, logprobs=2),
    SamplingParams(min_tokens=3, min_p=0.2, logprobs=0),
    SamplingParams(temperature=0.0, min_tokens=5, logit_bias={0: 100.0}),
    SamplingParams(temperature=0.9, top_k=VOCAB + 10, top_p=0.3, repetition_penalty=0.8),
]


def fill(state, slot, i):
    prompt, output = (3, 4, i), (5, 5, i)
    state.set_slot(slot, MIXED[i], 1000 + i, (0, 1), prompt, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_batch_order_or_slots(dtype):
    logits = random_logits(len(MIXED), seed=5).to(dtype)
    position = list(range(3, 3 + len(MIXED)))
    alone = []
    for i in range(len(MIXED)):
        state = SamplingState(1, VOCAB, "cpu")
        fill(state, 0, i)
        alone.append(run(state, logits[i : i + 1], [0], position[i : i + 1]).to_host()[0])

    order = np.random.default_rng(0)
    for size in (2, 3, 5, len(MIXED)):
        for _ in range(12):
            members = order.permutation(len(MIXED))[:size].tolist()
            slots = order.permutation(40)[:size].tolist()
            state = SamplingState(40, VOCAB, "cpu")
            for i, slot in zip(members, slots, strict=True):
                fill(state, slot, i)
            got = run(state, logits[members], slots, [position[i] for i in members]).to_host()
            assert got == [alone[i] for i in members]


def test_large_batches_are_sampled_in_parts(monkeypatch):
    logits = random_logits(len(MIXED), seed=6)
    positions = [2] * len(MIXED)
    results = []
    for limit in (1 << 24, 5 * VOCAB, 1):
        monkeypatch.setattr(sampler, "_MAX_LOGITS_AT_ONCE", limit)
        state = SamplingState(len(MIXED), VOCAB, "cpu")
        for i in range(len(MIXED)):
            fill(state, i, i)
        results.append([run(state, logits, list(range(len(MIXED))), positions).to_host() for _ in range(2)])
    assert results[0] == results[1] == results[2]


def test_eviction_and_return_change_nothing():
    rows = range(len(MIXED))
    steps = [random_logits(len(MIXED), seed=20 + step, scale=1.0) for step in range(8)]

    def outputs(evict_at):
        state = SamplingState(2 * len(MIXED), VOCAB, "cpu")
        slots, produced = list(rows), [[] for _ in rows]
        for i in rows:
            state.set_slot(i, MIXED[i], i, (0, 1), (3, 4))
        for step, logits in enumerate(steps):
            if step == evict_at:
                for i in rows:
                    state.clear_slot(slots[i])
                slots = [2 * len(MIXED) - 1 - i for i in rows]
                for i in rows:
                    state.set_slot(slots[i], MIXED[i], i, (0, 1), (3, 4), produced[i])
            for i, token in enumerate(run(state, logits, slots, [step] * len(MIXED)).token_ids.tolist()):
                produced[i].append(token)
        return produced

    assert outputs(evict_at=None) == outputs(evict_at=4)


def test_input_logits_are_left_alone():
    logits = random_logits(len(MIXED))
    before = logits.clone()
    state = SamplingState(len(MIXED), VOCAB, "cpu")
    for i in range(len(MIXED)):
        fill(state, i, i)
    run(state, logits, list(range(len(MIXED))), [0] * len(MIXED))
    assert torch.equal(logits, before)


def test_an_empty_batch_gives_no_tokens():
    state = SamplingState(1, VOCAB, "cpu")
    none = torch.tensor([]).long()
    assert sample(torch.zeros(0, VOCAB), none, none, state, [], TorchDraw()).to_host() == []


# --- truncation -------------------------------------------------------------------------------------------------------


def truncation_cases():
    generator = np.random.default_rng(1)
    for seed in range(40):
        ties = seed % 2
        logits = random_logits(1, vocab=37, seed=seed)[0]
        yield (
            logits.round() if ties else logits,
            int(generator.choice([0, 1, 2, 5, 36, 37])),
            float(generator.choice([1.0, 1e-9, 0.3, 0.77, 0.999])),
            float(generator.choice([0.0, 0.02, 0.4, 1.0])),
        )


def test_truncation_is_the_reference():
    for logits, top_k, top_p, min_p in truncation_cases():
        params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
        expected = reference_probabilities(logits.double().numpy(), params) > 0
        x = logits[None]
        if min_p:
            x = mask_min_p(x, torch.tensor([[min_p]]))
        k, p = torch.tensor([[top_k or 37]]), torch.tensor([[top_p]], dtype=torch.float64)
        got = mask_top_k_top_p(x, k, p, None)
        assert got.isfinite()[0].tolist() == expected.tolist(), params
        assert torch.equal(got[got.isfinite()], x[got.isfinite()])
        # Fewer sorted values give the same, and so does leaving top_p out where it is 1.
        assert torch.equal(mask_top_k_top_p(x, k, p, top_k or 37), got)
        if top_p == 1.0:
            assert torch.equal(mask_top_k(x, k, int(k)), got)


def test_tiny_top_p_and_top_k_one_are_greedy():
    logits = random_logits(1, seed=2)[0]
    for params in (SamplingParams(top_p=1e-12), SamplingParams(top_k=1), SamplingParams(min_p=1.0)):
        assert set(tokens_at(params, logits, range(200)).tolist()) == {int(logits.argmax())}


def test_ties_at_the_edge_stay_together():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -torch.inf]])
    k, p = torch.tensor([[2]]), torch.tensor([[1.0]], dtype=torch.float64)
    assert mask_top_k_top_p(logits, k, p, 2).isfinite().tolist() == [[False, True, True, True, True, False]]
    # Of the four that top_k leaves, the best has 0.475: a top_p of 0.5 takes the three equal ones along.
    half = torch.full_like(p, 0.5)
    assert mask_top_k_top_p(logits, k, half, 2).isfinite().tolist() == [[False, True, True, True, True, False]]
    less = torch.full_like(p, 0.47)
    assert mask_top_k_top_p(logits, k, less, 2).isfinite().tolist() == [[False, True, False, False, False, False]]


def test_top_k_beyond_the_vocabulary_keeps_everything():
    logits = random_logits(1, seed=4)[0]
    assert torch.equal(
        tokens_at(SamplingParams(top_k=10 * VOCAB), logits, range(300)),
        tokens_at(SamplingParams(), logits, range(300)),
    )


# --- edits and penalties ----------------------------------------------------------------------------------------------


def test_logit_bias_of_a_hundred_forces_and_forbids():
    logits = random_logits(1, seed=8)[0]
    best = int(logits.argmax())
    assert set(tokens_at(SamplingParams(logit_bias={11: 100.0}), logits, range(100)).tolist()) == {11}
    assert best not in tokens_at(SamplingParams(logit_bias={best: -100.0}), logits, range(500)).tolist()


def test_logit_bias_adds_exactly(monkeypatch):
    logits = random_logits(1, seed=9)[0]
    params = dataclasses.replace(GREEDY, logit_bias={0: 0.5, 13: -1.25, 63: 2.0})
    expected = logits.clone()
    expected[[0, 13, 63]] += torch.tensor([0.5, -1.25, 2.0])
    assert torch.equal(processed_logits(monkeypatch, params, logits), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_stop_tokens_until_then(temperature):
    logits = torch.zeros(VOCAB)
    logits[[5, 60]] = 50.0
    logits[30] = 20.0
    params = SamplingParams(temperature=temperature, min_tokens=4, logit_bias={5: 10.0})
    # 70 is no token of this model: there is nothing to forbid.
    tokens = tokens_at(params, logits, range(8), stop_token_ids=(5, 60, 70)).tolist()
    assert tokens == [30] * 4 + [5] * 4


def test_padding_of_edits_leaves_other_slots_alone():
    logits = random_logits(3, seed=10)
    state = SamplingState(3, VOCAB, "cpu")
    wide = dict.fromkeys(range(5), 1.0)
    state.set_slot(0, dataclasses.replace(GREEDY, logit_bias={0: 90.0}), 0)
    assert run(state, logits[:1], [0], [0]).token_ids.tolist() == [0]
    state.set_slot(1, dataclasses.replace(GREEDY, logit_bias=wide | {9: 90.0}), 0)
    state.set_slot(2, dataclasses.replace(GREEDY, logit_bias={8: 90.0}), 0)
    assert run(state, logits, [0, 1, 2], [1, 0, 0]).token_ids.tolist() == [0, 9, 8]
    state.set_slot(1, dataclasses.replace(GREEDY, logit_bias={7: 90.0}), 0)
    assert run(state, logits, [0, 1, 2], [2, 0, 1]).token_ids.tolist() == [0, 7, 8]


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.3, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 0.6, 0.0), (1.0, 0.0, -0.9), (1.2, -0.3, 0.4)],
)
def test_penalties_are_the_reference(monkeypatch, repetition, frequency, presence):
    logits = random_logits(1, seed=11)[0]
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4]
    params = dataclasses.replace(
        GREEDY, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    )
    expected = logits.double().numpy().copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token in set(output):
        expected[token] -= frequency * output.count(token) + presence
    got = processed_logits(monkeypatch, params, logits, prompt_token_ids=prompt, output_token_ids=output)
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=1e-5)


def test_sampled_tokens_are_counted():
    state = SamplingState(4, 3, "cpu")
    state.set_slot(2, dataclasses.replace(GREEDY, frequency_penalty=1.0), 0)
    state.set_slot(1, GREEDY, 0)
    logits = torch.tensor([[3.0, 1.5, -9.0], [3.0, 1.5, -9.0]])
    tokens = [run(state, logits, [2, 1], [position] * 2).token_ids.tolist() for position in range(5)]
    assert [pair[0] for pair in tokens] == [0, 0, 1, 0, 1]
    assert [pair[1] for pair in tokens] == [0] * 5


def test_a_new_sequence_inherits_no_counts():
    state = SamplingState(1, VOCAB, "cpu")
    penalized = dataclasses.replace(GREEDY, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    state.set_slot(0, penalized, 0, output_token_ids=[0, 1])
    assert run(state, logits, [0], [2]).token_ids.tolist() == [2]
    state.clear_slot(0)
    state.set_slot(0, penalized, 0)
    assert run(state, logits, [0], [0]).token_ids.tolist() == [0]


def test_counts_are_not_kept_before_someone_needs_them():
    state = SamplingState(8, VOCAB, "cpu")
    state.set_slot(0, SamplingParams(), 0, prompt_token_ids=[1], output_token_ids=[2])
    run(state, random_logits(1), [0], [0])
    assert state._output_counts.numel() == state._in_prompt.numel() == 0


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(4, seed=12)
    state = SamplingState(4, VOCAB, "cpu")
    state.set_slot(0, SamplingParams(logprobs=3, temperature=0.5, logit_bias={8: 100.0}), 0)
    state.set_slot(1, SamplingParams(), 1)
    state.set_slot(2, SamplingParams(logprobs=0), 2)
    state.set_slot(3, dataclasses.replace(GREEDY, logprobs=5, presence_penalty=1.0), 3)
    rows = run(state, logits, [0, 1, 2, 3], [0] * 4).to_host()
    expected = logits.double().log_softmax(-1)
    assert [None if logprobs is None else len(logprobs.top) for _, logprobs in rows] == [3, None, 0, 5]
    for row, (token, logprobs) in enumerate(rows):
        if logprobs is None:
            continue
        assert logprobs.token_logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
        best = expected[row].topk(len(logprobs.top))
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert rows[0][0] == 8


def test_top_logprobs_of_equal_logits_are_by_id():
    logits = torch.tensor([[-1.0, 2.0, -0.0, 0.0, 2.0, -1.0, -torch.inf]], dtype=torch.bfloat16)
    state = SamplingState(1, 7, "cpu")
    for asked in (4, 7):
        state.set_slot(0, dataclasses.replace(GREEDY, logprobs=asked), 0)
        ((_, logprobs),) = run(state, logits, [0], [0]).to_host()
        assert [token for token, _ in logprobs.top] == [1, 4, 2, 3, 0, 5, 6][:asked]


def test_more_logprobs_than_tokens():
    state = SamplingState(1, 5, "cpu")
    state.set_slot(0, dataclasses.replace(GREEDY, logprobs=20), 0)
    ((_, logprobs),) = run(state, torch.arange(5.0)[None], [0], [0]).to_host()
    assert [token for token, _ in logprobs.top] == [4, 3, 2, 1, 0]


def test_pack_is_one_tensor_that_unpack_reads():
    logits = random_logits(2, seed=13)
    state = SamplingState(2, VOCAB, "cpu")
    state.set_slot(0, SamplingParams(), 0)
    state.set_slot(1, SamplingParams(logprobs=2), 1)
    tokens = run(state, logits, [0, 1], [0, 0])
    packed = tokens.pack()
    assert packed.dtype == torch.int64
    assert packed.dim() == 1
    assert tokens.unpack(packed.clone()) == tokens.to_host()


# --- bad use ----------------------------------------------------------------------------------------------------------


def test_bad_slots_and_tokens_are_refused():
    state = SamplingState(2, VOCAB, "cpu")
    with pytest.raises(ValueError, match=r"slot=2: must be in 0\.\.1"):
        state.set_slot(2, GREEDY, 0)
    with pytest.raises(ValueError, match=r"logit_bias=64: token ids must be in 0\.\.63"):
        state.set_slot(0, SamplingParams(logit_bias={64: 1.0}), 0)
    with pytest.raises(RuntimeError, match="slot=1: cleared, but no sequence has it"):
        state.clear_slot(1)
    state.set_slot(0, GREEDY, 0)
    state.clear_slot(0)
    with pytest.raises(RuntimeError, match=r"slots=\[0\]: sampled, but no sequence has them"):
        run(state, random_logits(1), [0], [0])


def test_a_changed_slot_changes_a_steady_batch():
    logits = random_logits(2, seed=14).expand(2, VOCAB)
    state = SamplingState(2, VOCAB, "cpu")
    state.set_slot(0, GREEDY, 0)
    state.set_slot(1, GREEDY, 0)
    first = run(state, logits, [0, 1], [0, 0]).token_ids.tolist()
    assert run(state, logits, [0, 1], [1, 1]).token_ids.tolist() == first
    state.set_slot(1, dataclasses.replace(GREEDY, logit_bias={17: 100.0}), 0)
    assert run(state, logits, [0, 1], [2, 2]).token_ids.tolist() == [first[0], 17]
