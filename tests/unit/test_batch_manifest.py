"""The manifest beside a result file: what it records, and when a run may continue another's results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seesaw_ds.batch.manifest import Manifest, check_or_create, describe_run, manifest_path
from seesaw_ds.batch.results import open_results
from seesaw_ds.errors import UserError

RECORD = {"id": "x", "custom_id": "a", "response": {"status_code": 200}, "error": None}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    return path


def describe(source: Path, model: Path, seed: int = 0, dtype: str = "float32") -> Manifest:
    return describe_run(source, str(model), load_format="auto", dtype=dtype, max_model_len=64, seed=seed)


def test_manifest_tells_runs_apart(source: Path, model: Path) -> None:
    manifest = describe(source, model)
    assert manifest["input bytes"] == 3
    assert manifest["model model-2.safetensors bytes"] == len("model-2.safetensors")
    assert describe(source, model) == manifest
    assert describe(source, model, seed=1) != manifest
    for path in (source, model / "config.json", model / "tokenizer.json", model / "model-1.safetensors"):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert describe(source, model) != manifest, path
        path.write_bytes(before)
    (model / "chat_template.jinja").touch()
    assert describe(source, model) != manifest


def test_absent_files_are_named(source: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input=.*absent"):
        describe(tmp_path / "absent", model)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        describe(source, tmp_path / "absent")


def test_results_continue_under_the_same_manifest(source: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_results(output, describe(source, model), overwrite=False) as journal:
        journal.append(RECORD)
    assert json.loads(manifest_path(output).read_bytes()) == describe(source, model)
    with open_results(output, describe(source, model), overwrite=False) as journal:
        assert journal.is_done("a")


def test_each_difference_is_named_with_both_values(source: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_results(output, describe(source, model), overwrite=False) as journal:
        journal.append(RECORD)
    before = output.read_bytes(), manifest_path(output).read_bytes()
    (model / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="--overwrite") as caught:
        open_results(output, describe(source, model, seed=7, dtype="bfloat16"), overwrite=False)
    text = str(caught.value)
    assert "seed: 0 then, 7 now" in text
    assert 'dtype: "float32" then, "bfloat16" now' in text
    assert "model model-2.safetensors bytes: 19 then, absent now" in text
    assert "max_model_len" not in text
    assert (output.read_bytes(), manifest_path(output).read_bytes()) == before


def test_overwrite_starts_anew(source: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_results(output, describe(source, model), overwrite=False) as journal:
        journal.append(RECORD)
    with open_results(output, describe(source, model, seed=7), overwrite=True) as journal:
        assert journal.num_done == 0
    assert output.read_bytes() == b""
    assert json.loads(manifest_path(output).read_bytes())["seed"] == 7


def test_a_file_of_unknown_origin_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_bytes(b"a line\nand the last one without an end")
    with pytest.raises(UserError, match=r"no manifest.*--overwrite"):
        open_results(output, {"schema": 1}, overwrite=False)
    assert output.read_bytes() == b"a line\nand the last one without an end"
    assert not manifest_path(output).exists()


def test_a_run_that_died_before_its_first_result_binds_nobody(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    open_results(output, {"seed": 1}, overwrite=False).close()
    open_results(output, {"seed": 2}, overwrite=False).close()
    assert json.loads(manifest_path(output).read_bytes()) == {"seed": 2}


@pytest.mark.parametrize("damaged", [b"{oops", b"[]"])
def test_a_damaged_manifest(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="--overwrite"):
        check_or_create(path, {"schema": 1}, has_results=True)


def test_a_failed_write_keeps_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    check_or_create(path, {"seed": 1}, has_results=False)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        check_or_create(path, {"seed": 2}, has_results=False)
    assert json.loads(path.read_bytes()) == {"seed": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["m.json"]
