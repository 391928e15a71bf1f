"""A whole run: completions that are transformers' own, every line answered, a summary and a timeline of it."""

from __future__ import annotations

import json

import pytest
import torch

from job import Line, Model, good_lines, read_records
from launcher import Job

RANK_TRACKS = {"compute", "swap-out", "swap-in", "re-shard", "wait"}
SUMMARY_KEYS = [
    "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second", "num_failed",
    "resumed", "prompt_tokens", "output_tokens", "prompt_tokens_per_second", "output_tokens_per_second",
    "phase_seconds", "step_seconds", "startup_seconds", "transitions", "evictions", "layout_changes", "decode_steps",
    "decode_rows", "reshard", "peak_memory_bytes", "layouts", "model",
]  # fmt: skip


@pytest.fixture(scope="module")
def records(finished_job: Job) -> dict[str, Line]:
    assert finished_job.exit_code == 0, finished_job.said
    return {record["custom_id"]: record for record in read_records(finished_job.output)}


def choices(record: Line) -> list[Line]:
    assert record["response"]["status_code"] == 200, record
    assert record["error"] is None
    return record["response"]["body"]["choices"]


def prompt_ids(model: Model, line: Line) -> list[int]:
    body = line["body"]
    if "messages" not in body:
        return model.tokenizer.encode(body["prompt"])
    text = model.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    return model.tokenizer.encode(text, add_special_tokens=False)


def generate(model: Model, prompt: list[int], max_tokens: int) -> list[int]:
    output = model.llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=model.tokenizer.eos_token_id,
    )
    return output[0, len(prompt) :].tolist()


def test_greedy_text_is_that_of_transformers(model: Model, records: dict[str, Line]) -> None:
    lines = [line for line in good_lines() if line["custom_id"].startswith("greedy-")]
    for line in lines:
        prompt = prompt_ids(model, line)
        tokens = generate(model, prompt, line["body"]["max_tokens"])
        record = records[line["custom_id"]]
        (choice,) = choices(record)
        is_chat = "messages" in line["body"]
        text = choice["message"]["content"] if is_chat else choice["text"]
        assert text == model.tokenizer.decode(tokens, skip_special_tokens=True), line["custom_id"]
        has_ended = tokens[-1] == model.tokenizer.eos_token_id
        assert choice["finish_reason"] == ("stop" if has_ended else "length")
        body = record["response"]["body"]
        assert body["object"] == ("chat.completion" if is_chat else "text_completion")
        assert body["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        }


def test_every_good_line_is_answered(records: dict[str, Line]) -> None:
    for line in good_lines():
        body = line["body"]
        answers = choices(records[line["custom_id"]])
        num_prompts = len(body["prompt"]) if line["custom_id"] == "two-prompts" else 1
        assert [answer["index"] for answer in answers] == list(range(num_prompts * body.get("n", 1)))
        assert {answer["finish_reason"] for answer in answers} <= {"stop", "length"}
        if body.get("ignore_eos"):
            usage = records[line["custom_id"]]["response"]["body"]["usage"]
            assert usage["completion_tokens"] == body["max_tokens"]


def test_choices_of_one_request_differ_and_equal_seeds_agree(records: dict[str, Line]) -> None:
    pairs = [[choice["message"]["content"] for choice in choices(records[f"pair-{i}"])] for i in range(4)]
    assert all(first != second for first, second in pairs)
    (first,), (second,) = choices(records["seed-0"]), choices(records["seed-1"])
    assert first == second


def test_stop_string_ends_the_text_before_it(records: dict[str, Line]) -> None:
    (endless,) = choices(records["x-only"])
    assert (endless["text"], endless["finish_reason"]) == ("xxxxx", "length")
    (stopped,) = choices(records["stop"])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")
    assert records["stop"]["response"]["body"]["usage"]["completion_tokens"] == 3


def test_logprobs_are_those_of_the_greedy_tokens(records: dict[str, Line]) -> None:
    (choice,) = choices(records["logprobs"])
    logprobs = choice["logprobs"]
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 6
    )
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values()) < 0
    (choice,) = choices(records["chat-logprobs"])
    for entry in choice["logprobs"]["content"]:
        best = entry["top_logprobs"]
        assert len(best) == 3
        assert best[0]["logprob"] == entry["logprob"]
        assert best[0]["token"] == entry["token"]


def test_summary_counts_the_run(finished_job: Job, records: dict[str, Line]) -> None:
    summary = json.loads(finished_job.summary.read_text())
    assert list(summary) == SUMMARY_KEYS
    usages = [records[line["custom_id"]]["response"]["body"]["usage"] for line in good_lines()]
    assert summary["num_requests"] == len(usages)
    assert summary["resumed"] == 0
    assert summary["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert summary["output_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert summary["transitions"] >= 4
    assert set(summary["peak_memory_bytes"]) == {"0", "1"}
    for name in ("seconds", "weight_bytes", "kv_out_bytes", "kv_in_bytes"):
        assert summary["reshard"][name] > 0
    assert summary["layouts"] == finished_job.settings["layouts"]
    phases = summary["phase_seconds"]
    work = phases["prefill"] + phases["decode"] + phases["transition"]
    assert work == pytest.approx(summary["elapsed_time"], abs=0.1)


def test_timeline_has_each_rank_with_all_its_tracks(finished_job: Job) -> None:
    events = json.loads(finished_job.timeline.read_text())
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {processes[0], processes[1]} == {"rank 0 (replica 0)", "rank 1 (replica 0)"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for rank in (0, 1):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        # Spans of a track that overlap are in further rows, "swap-in 2".
        assert {threads[rank, e["tid"]].split(" ")[0] for e in spans} == RANK_TRACKS
        assert all(e["dur"] >= 0 for e in spans)
        for kind in ("prefill", "decode", "to decode", "to prefill"):
            assert any(e["name"] == kind for e in spans), kind


def test_run_leaves_nothing_but_its_results(finished_job: Job) -> None:
    assert finished_job.leftovers == []
    names = {path.name for path in finished_job.output.parent.iterdir()}
    assert names == {"results.jsonl", "results.jsonl.manifest.json", "summary.json", "timeline.json"}
    assert "Traceback" not in finished_job.said
