"""``layouts: auto``: which profile it takes, how long it thinks the input is, and what it answers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from plan_cases import ROOT, hardware
from seesaw_ds.batch.text import TextCodec
from seesaw_ds.config import ALL_HOST_MEMORY, RunConfig
from seesaw_ds.engine import auto_layouts, input_lengths
from seesaw_ds.engine import hardware as machines
from seesaw_ds.errors import UserError
from seesaw_ds.plan.workloads import RequestLength
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 640,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


class WordTokenizer:
    """A token a word, and no chat template."""

    def encode(self, text: str) -> list[int]:
        return [1] * len(text.split())

    def __len__(self) -> int:
        return 4096


@pytest.fixture(autouse=True)
def codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lengths, "load_codec", lambda folder: TextCodec(WordTokenizer(), [2]))


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return RunConfig(
        model=str(tmp_path),
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        layouts="auto",
        hardware="cpu",
        load_format="dummy",
        kv_offloading_size=0.1,
    )


def shape_of(run: RunConfig) -> ModelShape:
    return model_shape(read_hf_config(run.model))


def write_input(run: RunConfig, bodies: list[dict]) -> None:
    lines = (
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    )
    Path(run.input).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_results(run: RunConfig, output_tokens: dict[int, int]) -> None:
    with Path(run.output).open("w") as file:
        for i, tokens in output_tokens.items():
            usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
            response = {"status_code": 200, "body": {"choices": [{"text": "x"}], "usage": usage}}
            file.write(json.dumps({"custom_id": f"r{i}", "response": response, "error": None}) + "\n")
        file.write('{"custom_id": "torn')


def test_lengths_are_those_of_all_sequences_and_bad_lines_have_none(run: RunConfig) -> None:
    bodies = [{"prompt": "a b c", "max_tokens": 7}, {"prompt": ["a", "a b"], "n": 2}, {"prompt": 5}]
    write_input(run, bodies)
    lengths = input_lengths.input_lengths(run, shape_of(run), overwrite=False)
    assert lengths == [RequestLength(3, 7)] + [RequestLength(1, 16)] * 2 + [RequestLength(2, 16)] * 2


def test_a_large_file_is_sampled_evenly(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lengths, "MAX_SAMPLED_LINES", 10)
    write_input(run, [{"prompt": "w " * (1 + i // 10), "max_tokens": 8} for i in range(100)])
    lengths = input_lengths.input_lengths(run, shape_of(run), overwrite=False)
    assert lengths == [RequestLength(1 + i // 10, 8) for i in range(100)]


def test_a_few_bytes_of_a_large_file_are_tokenized(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lengths, "MAX_SAMPLED_BYTES", 2000)
    write_input(run, [{"prompt": "w " * 200, "max_tokens": 8}] * 50)
    assert input_lengths.input_lengths(run, shape_of(run), overwrite=False) == [RequestLength(200, 8)] * 50


def test_results_so_far_tell_how_long_outputs_become(run: RunConfig) -> None:
    write_input(run, [{"prompt": "a b c", "max_tokens": 100}] * 80)
    write_results(run, {i: 10 if i % 2 else 30 for i in range(40)})
    lengths = input_lengths.input_lengths(run, shape_of(run), overwrite=False)
    outputs = [length.output_tokens for length in lengths]
    assert len(outputs) == 40
    assert set(outputs) == {10, 30}
    assert 18 <= outputs.count(10) <= 22


def test_starting_anew_takes_each_lines_own_result(run: RunConfig) -> None:
    write_input(run, [{"prompt": "a b c", "max_tokens": 100}] * 30)
    write_results(run, {i: i + 1 for i in range(30)})
    lengths = input_lengths.input_lengths(run, shape_of(run), overwrite=True)
    assert [length.output_tokens for length in lengths] == [i + 1 for i in range(30)]
    assert input_lengths.input_lengths(run, shape_of(run), overwrite=False) == []


def test_a_handful_of_results_teaches_nothing_and_ignore_eos_runs_to_the_end(run: RunConfig) -> None:
    bodies = [{"prompt": "a b c", "max_tokens": 100}] * 30
    write_input(run, [*bodies, {"prompt": "a", "max_tokens": 50, "ignore_eos": True}])
    write_results(run, dict.fromkeys(range(input_lengths.MIN_RESULTS - 1), 10))
    few = input_lengths.input_lengths(run, shape_of(run), overwrite=False)
    assert {length.output_tokens for length in few} == {100, 50}
    write_results(run, dict.fromkeys(range(input_lengths.MIN_RESULTS), 10))
    enough = input_lengths.input_lengths(run, shape_of(run), overwrite=False)
    assert {length.output_tokens for length in enough} == {10, 50}


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped profiles in a folder of the test's own, on a machine with an H200."""
    folder = tmp_path / "hardware"
    folder.mkdir()
    for name in ("h200-nvlink", "h200-p2p-off", "cpu"):
        (folder / f"{name}.yaml").write_text((ROOT / "configs" / "hardware" / f"{name}.yaml").read_text())
    monkeypatch.setattr(machines, "PROFILES", folder)
    monkeypatch.setattr(machines, "_gpu_name", lambda: "NVIDIA H200")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    return folder


def test_the_devices_name_and_its_links_choose_the_profile(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines.find_hardware(None).name == "h200-nvlink"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert machines.find_hardware(None).name == "h200-p2p-off"
    local = yaml.safe_load((profiles / "h200-p2p-off.yaml").read_text()) | {"name": "local-p2p-off"}
    (profiles / "local-p2p-off.yaml").write_text(yaml.safe_dump(local))
    assert machines.find_hardware(None).name == "local-p2p-off"
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    assert machines.find_hardware(None).name == "h200-nvlink"


def test_an_unknown_gpu_asks_for_a_calibration(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_gpu_name", lambda: "NVIDIA B300")
    with pytest.raises(UserError, match=r"no profile of 'NVIDIA B300'; measure one with python tools/calibrate.py"):
        machines.find_hardware(None)
    assert machines.find_hardware("h200-nvlink").name == "h200-nvlink"
    assert machines.find_hardware(str(profiles / "cpu.yaml")).name == "cpu"
    with pytest.raises(UserError, match="hardware='h2000': cannot be read"):
        machines.find_hardware("h2000")


def test_a_processor_that_is_not_calibrated_is_guessed_with_a_warning(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert machines.is_cpu(machines.device_name())
    assert machines.find_hardware(None).name == "cpu"
    assert "tools/calibrate.py measures it" in caplog.text


def test_the_choice_is_made_and_explained(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_input(run, [{"prompt": "w " * 300, "max_tokens": 32}] * 40)
    slow_links = replace(hardware("cpu"), all_reduce={2: ((0.0, 0.05), (1e6, 0.1))}, send_seconds=0.05)
    monkeypatch.setattr(auto_layouts, "find_hardware", lambda name: slow_links)
    with caplog.at_level(logging.INFO):
        chosen = auto_layouts.choose_layouts(replace(run, max_num_batched_tokens=512), 2, 2, overwrite=False)
    assert chosen.layouts == "D2"
    assert chosen.max_num_batched_tokens <= 512
    first, second = (record.getMessage() for record in caplog.records if "layouts=auto" in record.getMessage())
    tokens, num_seqs = chosen.max_num_batched_tokens, chosen.max_num_seqs
    settings = f"max_num_batched_tokens={tokens}, max_num_seqs={num_seqs}, kv_offloading_size=0.1"
    assert f"layouts=auto: D2, {settings}, predicted" in first
    assert num_seqs == 20
    assert "for 40 sequences: prefill" in first
    assert "hardware cpu" in first
    assert "P2->T2" in second


def test_a_host_pool_that_is_left_open_holds_what_is_free_or_all_there_is(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [RequestLength(1000, 500)] * 1000
    token_bytes = 4 * 2 * 8 * 16 * 4  # layers, K and V, heads, head dim, float32
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))
    size = auto_layouts._largest_host_pool(run, shape_of(run), lengths, 2)
    assert size == pytest.approx(1_500_000 * token_bytes / 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 << 30))
    assert auto_layouts._largest_host_pool(run, shape_of(run), lengths, 2) == pytest.approx(3.0)
    # One request of the longest length, 2048 tokens, has room on each of two replicas.
    longest = 2 * 2064 * token_bytes / 2**30
    assert auto_layouts._largest_host_pool(run, shape_of(run), lengths[:1], 2) == pytest.approx(longest)
    write_input(run, [{"prompt": "w " * 30, "max_tokens": 8}] * 4)
    chosen = auto_layouts.choose_layouts(replace(run, kv_offloading_size=ALL_HOST_MEMORY), 2, 2, overwrite=False)
    assert chosen.kv_offloading_size < 1


def test_what_cannot_run_says_what_would(run: RunConfig) -> None:
    write_input(run, [{"prompt": "a", "max_tokens": 4}])
    with pytest.raises(UserError, match=r"kv_offloading_size=0.001: one request of max_model_len=2048 needs 0.01 GiB"):
        auto_layouts.choose_layouts(replace(run, kv_offloading_size=0.001), 2, 2, overwrite=False)
    with pytest.raises(UserError, match="GiB are free; lower kv_offloading_size"):
        auto_layouts.choose_layouts(replace(run, kv_offloading_size=1e6), 2, 2, overwrite=False)


def test_lines_at_fault_alone_get_some_layout(run: RunConfig) -> None:
    write_input(run, [{"prompt": 5}])
    assert auto_layouts.choose_layouts(run, 2, 2, overwrite=False).layout_pair.world_size == 2
