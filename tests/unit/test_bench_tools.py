"""The benchmark tools' inputs, and what they say of a run; no engine is started."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import figures, make_model_folder, predict, print_table, random_prompts, run_settings, write_input
from seesaw_ds.errors import UserError
from seesaw_ds.plan.hardware import load_hardware
from seesaw_ds.plan.roofline import Machine, prefill_flops, roofline_seconds
from seesaw_ds.plan.workloads import RequestLength, parse_workload, workload_lengths

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(flops_per_second=750e12, bytes_per_second=4.3e12)


def test_named_workloads_have_the_published_means():
    for name, count, mean_in, mean_out in (("arxiv", 160, 2922, 215), ("sharegpt", 800, 282, 246)):
        lengths = workload_lengths(name, count)
        assert round(sum(length.input_tokens for length in lengths) / count) == mean_in
        assert round(sum(length.output_tokens for length in lengths) / count) == mean_out
    assert workload_lengths("3000x1000", 3) == [RequestLength(3000, 1000)] * 3


@pytest.mark.parametrize("text", ["arxiv", "arxiv:0", "arxiv:x", ":5"])
def test_a_workload_needs_a_name_and_a_count(text: str):
    with pytest.raises(UserError, match="NAME:REQUESTS"):
        parse_workload(text)


def test_an_unknown_workload_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="arxiv, sharegpt"):
        workload_lengths("alpaca", 3)


def test_the_roofline_of_one_prompt_is_its_compute_and_its_weight_reads(tmp_path: Path):
    shape = make_model_folder(tmp_path / "model", "llama3-8b", 100)
    length = RequestLength(1000, 11)
    weights = shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size
    kv = 10 * (1000 + 5.5) * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    expected = prefill_flops(shape, 1000) / 1500e12 + (10 * 2 * weights + kv) / 8.6e12
    assert roofline_seconds(shape, [length], MACHINE, 2) == pytest.approx(expected)


def test_more_rows_than_the_ridge_make_a_decode_step_compute(tmp_path: Path):
    shape = make_model_folder(tmp_path / "model", "llama3-8b", 100)
    few = roofline_seconds(shape, [RequestLength(1, 101)] * 10, MACHINE, 1)
    many = roofline_seconds(shape, [RequestLength(1, 101)] * 1000, MACHINE, 1)
    assert many / few > 4


def test_the_input_is_a_batch_file_of_the_lengths_asked_for(tmp_path: Path):
    lengths = workload_lengths("sharegpt", 20)
    write_input(tmp_path / "in.jsonl", lengths, vocab_size=500)
    lines = [json.loads(line) for line in (tmp_path / "in.jsonl").open()]
    assert len({line["custom_id"] for line in lines}) == 20
    for line, length, prompt in zip(lines, lengths, random_prompts(lengths, 500), strict=True):
        assert line["body"]["prompt"] == prompt and len(prompt) == length.input_tokens
        assert line["body"]["max_tokens"] == length.output_tokens and line["body"]["ignore_eos"]
        assert all(3 <= token < 500 for token in prompt)


def test_figures_relate_a_run_to_the_machine(tmp_path: Path):
    shape = make_model_folder(tmp_path / "model", "llama3-8b", 100)
    lengths = [RequestLength(1000, 11)] * 4
    floor = roofline_seconds(shape, lengths, MACHINE, 2)
    seconds = {"prefill": 2 * 4 * prefill_flops(shape, 1000) / 1500e12, "decode": 1.0}
    summary = {"elapsed_time": 2 * floor, "step_seconds": seconds, "decode_steps": 10, "decode_rows": 40}
    row = figures(summary, shape, lengths, MACHINE, 2)
    assert row["prefill_mfu"] == pytest.approx(0.5, abs=1e-3)
    # Ten steps read the weights ten times; four sequences of about 1,005 tokens are read at each.
    weights = shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size
    kv_token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    expected = 10 * (2 * weights + 4 * 1005.5 * kv_token_bytes) / 8.6e12
    assert row["decode_hbm_utilisation"] == pytest.approx(expected, abs=1e-4)
    assert row["roofline_ratio"] == pytest.approx(0.5, abs=1e-3)
    assert row["roofline_requests_per_second"] == pytest.approx(4 / floor, rel=1e-3)


@pytest.mark.parametrize("layouts", ["P2->T2", "T2"])
def test_predictions_stand_beside_what_was_measured(tmp_path: Path, capsys, layouts: str):
    shape = make_model_folder(tmp_path / "model", "llama3-8b", 1000)
    lengths = [RequestLength(500, 50)] * 20
    settings = run_settings(["max_num_seqs=20", "kv_offloading_size=1"], tmp_path / "model", 1000, layouts, tmp_path)
    predicted = predict(settings, shape, lengths, load_hardware(ROOT / "configs/hardware/h100.yaml"))
    parts = [predicted[part] for part in ("prefill", "decode", "transition")]
    assert sum(parts) == pytest.approx(20 / predicted["requests_per_second"], rel=0.02)
    assert min(parts[:2]) > 0 and (parts[2] > 0) == (layouts == "P2->T2")
    row = {
        "workload": "500x50:20", "layouts": layouts, "requests_per_second": 0.9 * predicted["requests_per_second"],
        "tokens_per_second": 1.0, "step_seconds": {"prefill": 1.25 * parts[0], "decode": parts[1]},
        "phase_seconds": {"transition": 1.1 * parts[2], "startup": 3.0}, "transitions": 1, "evictions": 0,
        "prefill_mfu": 0.5, "decode_hbm_utilisation": 0.5, "roofline_ratio": 0.5, "predicted": predicted,
    }  # fmt: skip
    print_table([row])
    *_, values, changes = capsys.readouterr().out.splitlines()
    assert values.split()[:2] == ["predicted", "h100"]
    expected = ["measured", "-10.0%", "+25.0%", "+0.0%", "+10.0%"]
    assert changes.split() == expected[: len(expected) - (layouts == "T2")]


def test_comparing_without_vllm_says_so(tmp_path: Path):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    command = [sys.executable, str(ROOT / "tools/compare_vllm.py"), "--model-shape", "llama3-8b"]
    done = subprocess.run([*command, "--workload", "arxiv:2", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: vllm cannot be imported")
