"""The cost model: appendix A's terms as written, and what the finer model adds to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan_cases import hardware, pair, shape
from seesaw_ds.errors import UserError
from seesaw_ds.layout import ParallelLayout, Phase
from seesaw_ds.plan.appendix_a import Rates, layer_terms, max_batch, seconds_per_sequence
from seesaw_ds.plan.cost import CostModel, StepWork, add_work, chunk_work
from seesaw_ds.plan.transfers import CopyLanes, preload_size, reshard_seconds
from seesaw_ds.sched.output import PreloadSize

MODEL = shape("llama2-70b")
RATES = Rates(flops=100e12, memory_bandwidth=500e9, all_reduce_bandwidth=lambda tp: 10e9 / tp)


def cost(layouts: str, machine: str = "a10") -> CostModel:
    return CostModel(MODEL, hardware(machine), ParallelLayout.parse(layouts), "bfloat16")


def test_appendix_a_terms_are_those_of_the_table():
    parameters = MODEL.layer_parameters
    prefill = layer_terms(MODEL, RATES, Phase.PREFILL, b=2, s=1000, tp=4)
    assert prefill.linear_memory == pytest.approx(2 * parameters / 500e9)
    assert prefill.linear_compute == pytest.approx(2 * 2 * parameters * 1000 / 100e12)
    assert prefill.attention_memory == pytest.approx(2 * 2 * 1000 * (64 + 16) * 128 / 500e9)
    assert prefill.attention_compute == pytest.approx(2 * 64 * 1000**2 * 128 * 2 / 100e12)
    assert prefill.network == pytest.approx(4 * 2 * 1000 * 64 * 128 / 2.5e9)
    decode = layer_terms(MODEL, RATES, Phase.DECODE, b=2, s=1000, tp=4)
    assert decode.linear_compute == pytest.approx(2 * 2 * parameters / 100e12)
    assert decode.attention_memory == pytest.approx(4 * 2 * 1000 * 8 * 128 / 500e9)
    assert decode.attention_compute == pytest.approx(2 * 2 * 64 * 1000 * 128 / 100e12)
    assert decode.network == pytest.approx(4 * 2 * 64 * 128 / 2.5e9)
    assert layer_terms(MODEL, RATES, Phase.DECODE, b=2, s=1000, tp=1).network == 0.0


def test_appendix_a_prefers_pipelines_in_prefill_and_tensors_in_decode():
    def seconds(phase: Phase, layouts: str) -> float:
        layout = ParallelLayout.parse(layouts)
        terms = layer_terms(MODEL, RATES, phase, b=16, s=1000, tp=layout.tp)
        return seconds_per_sequence(MODEL, terms, layout, b=16)

    assert seconds(Phase.PREFILL, "P8") < seconds(Phase.PREFILL, "T4P2") < seconds(Phase.PREFILL, "T8")
    assert seconds(Phase.DECODE, "T4P2") < seconds(Phase.DECODE, "T2P4") < seconds(Phase.DECODE, "P8")


def test_appendix_a_largest_batch_fills_what_the_weights_leave():
    layout = ParallelLayout.parse("T4P2")
    room = 24e9 * 8 - 2 * 80 * MODEL.layer_parameters
    assert max_batch(MODEL, 24e9, layout, s=1000) == pytest.approx(room / (80 * 4 * 8 * 128 * 1000))
    assert max_batch(MODEL, 24e9, ParallelLayout.parse("D4T2"), s=1000) < 0


def test_linear_seconds_follow_the_roofline_and_round_its_ridge():
    model = cost("T1")
    parameters = 1e8
    memory = model.linear_seconds(parameters, 1)
    assert memory == pytest.approx(parameters * 2 / (600 * 2**30 * 0.9), rel=1e-3)
    compute = model.linear_seconds(parameters, 100_000)
    assert compute == pytest.approx(2 * parameters * 100_000 / (125e12 * 0.75), rel=1e-3)
    ridge = round(memory * 125e12 * 0.75 / 2 / parameters)
    assert model.linear_seconds(parameters, ridge) == pytest.approx(2**0.25 * memory, rel=0.01)


def test_measured_products_take_the_place_of_the_roofline():
    machine = replace(hardware("a10"), linear={"bfloat16": ((1.0, 1e-12), (100.0, 2e-12), (200.0, 4e-12))})
    model = CostModel(MODEL, machine, ParallelLayout(), "bfloat16")
    assert model.linear_seconds(1e9, 100) == pytest.approx(2e-3)
    assert model.linear_seconds(1e9, 150) == pytest.approx(3e-3)
    assert model.linear_seconds(1e9, 400) == pytest.approx(8e-3)
    other = CostModel(MODEL, machine, ParallelLayout(), "float16")
    assert other.linear_seconds(1e9, 1) == pytest.approx(cost("T1").linear_seconds(1e9, 1))


def test_steps_of_few_rows_have_this_engines_own_kernels():
    few = {"bfloat16": ((1.0, 0.8e-12), (64.0, 0.9e-12))}
    sums = {2: ((0.0, 1e-6), (1e6, 2e-6))}
    machine = replace(hardware("h200-p2p-off"), row_linear=few, row_all_reduce=sums, row_layer_seconds=5e-6)
    model = CostModel(MODEL, machine, ParallelLayout(tp=2), "bfloat16")
    others = replace(model, is_ours=False)
    plain = CostModel(MODEL, hardware("h200-p2p-off"), ParallelLayout(tp=2), "bfloat16", is_ours=False)
    assert model.linear_seconds(1e9, 64) == pytest.approx(0.9e-3)
    assert others.linear_seconds(1e9, 64) == plain.linear_seconds(1e9, 64)
    assert model.linear_seconds(1e9, 65) == plain.linear_seconds(1e9, 65)
    many = StepWork(num_tokens=65, num_rows=65)
    assert model.layer_seconds(many) == others.layer_seconds(many)
    work = StepWork(num_tokens=64, num_rows=64)
    products = others.linear_seconds(MODEL.layer_parameters / 2, 64) - 0.9e-12 * MODEL.layer_parameters / 2
    message = 64 * MODEL.hidden_size * 2
    waits = 2 * (machine.all_reduce_seconds(message, 2) - 1e-6 - message * 1e-12)
    gained = products + waits + machine.layer_seconds - 5e-6
    assert others.layer_seconds(work) - model.layer_seconds(work) == pytest.approx(gained)
    without = replace(model, hardware=replace(machine, row_layer_seconds=None))
    assert without.layer_seconds(work) - model.layer_seconds(work) == pytest.approx(machine.layer_seconds - 5e-6)


def test_measured_bandwidths_hold_for_what_they_were_measured_on():
    machine = replace(hardware("a10"), kv_bandwidth=1e9, element_bandwidth=2e9)
    model = CostModel(MODEL, machine, ParallelLayout(), "bfloat16")
    work = StepWork(num_tokens=1, decode_context=50_000, num_rows=1)
    attention = 2 * 8 * 128 * 2 * 50_000 / 1e9
    assert model.attention_seconds(work) == pytest.approx(attention)
    rest = model.linear_seconds(MODEL.layer_parameters, 1) + machine.layer_seconds
    assert model.layer_seconds(work) == pytest.approx(attention + rest + model.element_bytes(1) / 2e9)


def test_no_step_is_shorter_than_the_hosts_work_for_it():
    work = StepWork(num_tokens=4, decode_context=2000, num_rows=4)
    model = CostModel(MODEL, hardware("h200-nvlink"), ParallelLayout(pp=4), "bfloat16")
    longest = max(model.stage_seconds(work))
    floored = replace(model, hardware=replace(model.hardware, least_step_seconds=2 * longest))
    assert floored.stage_seconds(work) == [2 * longest] * 4
    assert floored.step_interval(work, 4) == pytest.approx(2 * longest, rel=0.1)
    hidden = replace(model, hardware=replace(model.hardware, least_step_seconds=0.5 * min(model.stage_seconds(work))))
    assert hidden.stage_seconds(work) == model.stage_seconds(work)


def test_padded_attention_reads_every_row_to_the_longest():
    padded = CostModel(MODEL, replace(hardware("a10"), pads_decode=1.0), ParallelLayout(), "bfloat16")
    assert padded.decode_work([10, 500, 90]) == StepWork(num_tokens=3, decode_context=1500, num_rows=3)
    assert padded.decode_work([]) == StepWork()
    assert cost("T1").decode_work([10, 500, 90]) == StepWork(num_tokens=3, decode_context=600, num_rows=3)


def test_chunks_of_a_prompt_add_up_to_the_whole():
    whole = chunk_work(0, 1000, True)
    parts = add_work(chunk_work(0, 300, False), chunk_work(300, 700, True))
    assert parts.prefill_pairs == whole.prefill_pairs == 1000 * 1001 // 2
    assert (parts.num_tokens, parts.num_rows) == (whole.num_tokens, whole.num_rows)
    assert parts.prefill_context == 300 + 1000  # the second chunk reads the first one's KV again
    assert add_work() == StepWork()


def test_prefill_attention_is_quadratic_and_decode_attention_reads_kv():
    model = cost("T1")
    short, long = (model.attention_seconds(chunk_work(0, tokens, True)) for tokens in (2000, 4000))
    assert long / short == pytest.approx(4, rel=0.01)
    kv_bytes = 2 * 8 * 128 * 2 * 50_000
    bandwidth = hardware("a10").memory_bandwidth * 0.9
    assert model.attention_seconds(StepWork(decode_context=50_000)) == pytest.approx(kv_bytes / bandwidth)


def test_small_all_reduces_cost_their_latency():
    work = StepWork(num_tokens=1, decode_context=100, num_rows=1)
    extra = cost("T4").layer_seconds(work) - 2 * 35e-6
    assert 0 < extra < cost("T1").layer_seconds(work)


def test_uneven_stages_and_the_head_show_in_the_stage_times():
    model = replace(MODEL, num_layers=10)
    stages = CostModel(model, hardware("a10"), ParallelLayout.parse("P4"), "bfloat16")
    assert stages.stage_layers == (3, 3, 2, 2)
    work = StepWork(num_tokens=64, decode_context=64_000, num_rows=64)
    seconds = stages.stage_seconds(work)
    assert seconds[0] == seconds[1] == pytest.approx(1.5 * seconds[2])
    assert seconds[3] == pytest.approx(seconds[2] + stages.head_seconds(64))


def test_after_attention_the_last_layer_has_the_sampled_rows_alone():
    machine = replace(
        hardware("a10"),
        linear={"bfloat16": ((0.0, 1e-12), (1000.0, 11e-12))},
        all_reduce={2: ((0.0, 1e-5), (16384000.0, 1.01e-3))},  # 1 us a token beside the latency
    )
    model = CostModel(MODEL, machine, ParallelLayout.parse("T2P2"), "bfloat16")
    rest = (64 * 128 + 3 * 28672) * 8192 / 2  # o projection, gate, up and down on one of two ranks
    for num_rows, num_left in ((30, 30), (1, 1), (0, 1)):
        work = StepWork(num_tokens=500, prefill_pairs=100_000, prefill_context=500, num_rows=num_rows)
        first, last = model.stage_seconds(work)
        spared = (500 - num_left) * (rest * 10e-15 + 2 * 1e-6)
        assert first == 40 * model.layer_seconds(work)
        assert last == pytest.approx(first + model.head_seconds(num_rows) - spared, rel=1e-12)
        others = replace(model, is_ours=False)
        assert others.stage_seconds(work) == [first, first + model.head_seconds(num_rows)]


@pytest.mark.parametrize("layouts", ["T1", "T4P2", "P8"])
def test_a_decode_step_takes_as_long_in_engines_that_run_all_layers_for_all_tokens(layouts):
    model = cost(layouts)
    for work in (model.decode_work([900] * 64), model.group_work(1, 5000.0)):
        assert model.stage_seconds(work) == replace(model, is_ours=False).stage_seconds(work)


def test_a_dtype_without_a_rate_is_refused():
    machine = replace(hardware("a10"), flops={"bfloat16": 1e12})
    model = CostModel(MODEL, machine, ParallelLayout(), "float32")
    with pytest.raises(UserError, match=r"dtype='float32'.*flops for bfloat16 only"):
        model.linear_seconds(1e6, 1)


def test_what_is_missing_comes_from_other_devices_or_the_host():
    machine = replace(hardware("h200-p2p-off"), send_seconds=1e-12)
    layer_bytes = 80 * MODEL.layer_parameters * 2
    exchange = reshard_seconds(MODEL, pair("P2->T2"), machine, "bfloat16", "exchange", 16)
    assert exchange.to(Phase.DECODE) == pytest.approx(layer_bytes / 4 / machine.send_bandwidth)
    assert exchange.to(Phase.PREFILL) == pytest.approx(exchange.to(Phase.DECODE))
    host = reshard_seconds(MODEL, pair("P2->T2"), machine, "bfloat16", "host", 16)
    assert host.to(Phase.DECODE) == pytest.approx(layer_bytes / 4 / machine.host_to_device)
    static = reshard_seconds(MODEL, pair("T2"), machine, "bfloat16", "host", 16)
    assert static.to(Phase.DECODE, 100) == static.to(Phase.PREFILL, 100) == 0.0


def test_an_exchange_may_be_slower_than_a_send():
    machine = replace(hardware("h200-p2p-off"), send_seconds=1e-12, exchange_bandwidth=2e10)
    reshard = reshard_seconds(MODEL, pair("P2->T2"), machine, "bfloat16", "exchange", 16)
    assert reshard.to(Phase.DECODE) == pytest.approx(80 * MODEL.layer_parameters * 2 / 4 / 2e10)
    block_bytes = 2 * 80 * 8 * 16 * 128 * 2
    in_memory = 2 / 2 / (machine.memory_bandwidth * machine.memory_efficiency)
    blocks = reshard.to(Phase.DECODE, 1000) - reshard.to(Phase.DECODE)
    assert blocks == pytest.approx(1000 * block_bytes * (in_memory + 1 / 4 / 2e10))


def test_weights_that_come_early_are_only_copied_within_the_device():
    machine = replace(hardware("h200-p2p-off"), send_seconds=1e-12)
    reshard = reshard_seconds(MODEL, pair("P2->T2"), machine, "bfloat16", "exchange", 16)
    layer_bytes = 80 * MODEL.layer_parameters * 2
    landing = 2 * layer_bytes / 4 / (machine.memory_bandwidth * machine.memory_efficiency)
    assert reshard.to(Phase.DECODE, preloaded=1.0) == pytest.approx(landing)
    half = reshard.to(Phase.DECODE, 10, preloaded=0.5)
    assert half == pytest.approx((landing + reshard.to(Phase.DECODE, 20)) / 2)


@pytest.mark.parametrize(
    ("machine", "exchange", "duplex", "rate"),
    [("h200-nvlink", 236e9, 34e9, 34e9), ("h200-p2p-off", 30e9, 34e9, 30e9), ("cpu", 1e9, 2.5e9, 1e9)],
)
def test_weights_that_come_early_go_through_host_memory(machine: str, exchange: float, duplex: float, rate: float):
    profile = replace(hardware(machine), send_seconds=1e-12, exchange_bandwidth=exchange, duplex=duplex)
    to_decode = reshard_seconds(MODEL, pair("P2->T2"), profile, "bfloat16", "exchange", 16).to_decode
    num_bytes = 80 * MODEL.layer_parameters * 2 / 4
    assert to_decode.weights == pytest.approx(num_bytes / exchange)
    assert to_decode.early == pytest.approx(num_bytes / rate)


def test_blocks_of_the_smallest_shard_bound_what_comes_early():
    # A cell is half a layer, 816 MiB; a block of 16 tokens has 40 layers of 8 heads, 2.5 MiB.
    assert preload_size(MODEL, pair("P2->T2"), "bfloat16", "exchange", 16) == PreloadSize(40, 327)
    # The first rank's blocks have 80 layers of four heads in decode, the second one's 60 of eight in prefill.
    assert preload_size(MODEL, pair("P2[20,60]->T2"), "bfloat16", "exchange", 16) == PreloadSize(60, 327)
    # An eighth of a layer, and blocks of ten layers.
    assert preload_size(MODEL, pair("P8->T8"), "bfloat16", "exchange", 16) == PreloadSize(70, 327)
    assert preload_size(MODEL, pair("P2->T2"), "bfloat16", "host", 16) is None
    assert preload_size(MODEL, pair("T2"), "bfloat16", "exchange", 16) is None


def test_kv_on_the_devices_moves_where_its_owner_changes_and_is_rewritten_everywhere():
    machine = hardware("h200-p2p-off")
    block_bytes = 2 * 80 * 8 * 16 * 128 * 2

    def kv_seconds(layouts: str, num_blocks: int) -> float:
        reshard = reshard_seconds(MODEL, pair(layouts), machine, "bfloat16", "exchange", 16)
        return reshard.to(Phase.DECODE, num_blocks) - reshard.to(Phase.DECODE)

    bandwidth = machine.memory_bandwidth * machine.memory_efficiency
    # Half of a rank's half stays: layers 0 to 39 of half the heads.
    in_two = 1000 * block_bytes * (2 / 2 / bandwidth + 1 / 4 / machine.send_bandwidth)
    assert kv_seconds("P2->T2", 1000) == pytest.approx(in_two)
    in_eight = 1000 * block_bytes * (2 / 8 / bandwidth + 7 / 64 / machine.send_bandwidth)
    assert kv_seconds("P8->T8", 1000) == pytest.approx(in_eight)
    assert kv_seconds("P2->T2", 0) == 0.0


def test_copies_queue_and_slow_each_other_down():
    machine = replace(hardware("a10"), host_to_device=10.0, device_to_host=20.0, duplex=5.0)
    lanes = CopyLanes(machine)
    assert lanes.copy_in(0.0, 100) == 10.0
    assert lanes.copy_in(1.0, 100) == 20.0
    assert lanes.copy_out(5.0, 100) == 25.0  # the other lane is busy
    assert lanes.copy_out(30.0, 100) == 35.0
