"""Settings and files that do not fit: found before a model is loaded, told once, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import MAX_MODEL_LEN, Model
from launcher import Job, StartRun
from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.engine.preflight import check_run, is_finished, load_config
from seesaw_ds.errors import UserError

Settings = dict[str, Any]


@pytest.fixture
def settings(job_settings: dict[str, object], model: Model, tmp_path: Path) -> Settings:
    """Settings that fit, with a copy of the model to damage."""
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder)
    return {**job_settings, "model": str(folder), "output": str(tmp_path / "results.jsonl")}


def preflight(settings: Settings, *changes: str, overwrite: bool = False) -> bool:
    """What rank 0 of two does before it starts anything; whether the job is finished."""
    config = Path(settings["model"]).with_name("config.yaml")
    config.write_text(yaml.safe_dump(settings))
    run = load_config(str(config), changes, None, None)
    check_run(run, world_size=2)
    return is_finished(run, overwrite)


def test_settings_that_fit_pass(settings: Settings) -> None:
    assert preflight(settings) is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model=/no/such/folder", "no config.json there"),
        ("input=/no/such/file.jsonl", "input='/no/such/file.jsonl': cannot be read"),
        ("max_num_sequences=3", "did you mean 'max_num_seqs'"),
        ("max_num_seqs=many", "max_num_seqs='many': must be int"),
        ("max_num_seqs=0", "must be at least 1"),
        ("model=[", "not YAML"),
        ("layouts=P2->X2", "a layout is letters D, T, P"),
        ("layouts=P2->D2", "data-parallel size must be the same"),
        ("layouts=P2[2]->T2", "2 stages need 2 numbers of layers, not 1; give one for each stage"),
        ("layouts=P2[4,0]->T2", "the layers of each stage, at least 1"),
        ("layouts=P2[90,1]->T2", "the stages have 91 layers, but num_hidden_layers="),
        ("layouts=P4->T4", "needs 4 ranks, but 2 were launched"),
        ("layouts=T2P2->P2", "both phases must use the same ranks"),
        ("num_gpu_kv_blocks=11", f"needs {MAX_MODEL_LEN // 16} blocks"),
        ("num_host_kv_blocks=11", f"needs {MAX_MODEL_LEN // 16} blocks"),
        ("max_model_len=257", "max_position_embeddings is 256"),
        ("dtype=int8", "must be one of auto, float32"),
    ],
)
def test_setting_that_does_not_fit_is_named(settings: Settings, change: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight(settings, change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 must be a multiple of 2"),
        ({"intermediate_size": 97}, "intermediate_size=97 must be a multiple of 2"),
        ({"num_hidden_layers": 1}, "need at least as many layers"),
        ({"num_hidden_layers": 5}, "weights missing: model.layers.4."),
        ({"vocab_size": 300}, "config.json asks for"),
        ({"architectures": ["GPT2LMHeadModel"]}, "not supported; supported: LlamaForCausalLM"),
        ({"hidden_size": None}, "a size is not a number"),
    ],
)
def test_model_that_does_not_fit_is_named(settings: Settings, sizes: dict[str, object], message: str) -> None:
    config = Path(settings["model"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    with pytest.raises(UserError) as caught:
        preflight(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:100], "truncated within its header"),
        (lambda data: data[:4], "too short"),
        (lambda data: b"version https://example.com/spec/v1\n" * 9, "not a safetensors file"),
        (lambda data: data[:8] + b"x" * (len(data) - 8), "its header is not JSON"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
    ],
    ids=["half", "header", "bytes", "text", "garbage", "list"],
)
def test_damaged_safetensors_are_named(settings: Settings, damage: Callable[[bytes], bytes], message: str) -> None:
    path = Path(settings["model"]) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        preflight(settings)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_safetensors_are_named(settings: Settings) -> None:
    path = Path(settings["model"]) / "model.safetensors"
    path.unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors file there"):
        preflight(settings)
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(UserError, match=r"missing model-1\.safetensors"):
        preflight(settings)


def test_output_below_a_file_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output=.*results\.jsonl: cannot be written"):
        preflight(settings, f"output={tmp_path}/file/results.jsonl")


def test_output_of_a_run_under_way_is_refused(settings: Settings) -> None:
    with ResultJournal(Path(settings["output"])), pytest.raises(UserError, match="another run is writing it"):
        preflight(settings)


def test_results_of_another_run_are_not_continued(finished_job: Job, tmp_path: Path, settings: Settings) -> None:
    settings |= finished_job.settings | {"output": settings["output"]}
    for suffix in ("", ".manifest.json"):
        shutil.copy(f"{finished_job.output}{suffix}", f"{settings['output']}{suffix}")
    assert preflight(settings) is True
    with pytest.raises(UserError, match="seed: 7 then, 8 now"):
        preflight(settings, "seed=8")
    assert preflight(settings, "seed=8", overwrite=True) is False
    (tmp_path / "results.jsonl.manifest.json").unlink()
    with pytest.raises(UserError, match="has results but no manifest"):
        preflight(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layouts=P4->T4", "error: layouts='P4->T4': needs 4 ranks, but 2 were launched"),
        ("max_num_sequences=3", "error: max_num_sequences=3: unknown setting; did you mean 'max_num_seqs'?"),
        ("timeline=/dev/null/timeline.json", "error: timeline='/dev/null/timeline.json': cannot be written"),
    ],
)
def test_launched_run_ends_with_one_message(
    settings: Settings, start_run: StartRun, tmp_path: Path, change: str, message: str
) -> None:
    run = start_run(tmp_path, settings, "--set", change)
    assert run.wait() != 0
    (line,) = run.error_lines
    assert line.startswith(message)
    assert "Traceback" not in run.output
    assert run.leftovers() == []


def test_model_without_a_tokenizer_ends_with_one_message(
    settings: Settings, start_run: StartRun, tmp_path: Path
) -> None:
    for path in Path(settings["model"]).glob("tokenizer*"):
        path.unlink()
    run = start_run(tmp_path, settings)
    assert run.wait() != 0
    (line,) = run.error_lines
    assert "its tokenizer does not load" in line
    assert "Traceback" not in run.output
    assert run.leftovers() == []
