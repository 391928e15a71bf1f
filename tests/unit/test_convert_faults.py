"""What stops a conversion: it says so, leaves nothing under the final name, and goes on where it was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import make_llama
from seesaw_ds.checkpoint import convert as convert_module
from seesaw_ds.checkpoint import tensor_files
from seesaw_ds.checkpoint.convert import Conversion, convert
from seesaw_ds.checkpoint.formats import FORMATS
from seesaw_ds.checkpoint.hf import HFWriter
from seesaw_ds.checkpoint.journal import JOURNAL, ConversionJournal, partial_folder
from seesaw_ds.checkpoint.parts import units_of
from seesaw_ds.errors import UserError
from seesaw_ds.shapes import ModelShape, model_shape, read_hf_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
NUM_UNITS = 5  # embedding, three layers, head


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_llama(folder, num_hidden_layers=3)
    return folder


@pytest.fixture
def src(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "src"))


def job(src: Path, dst: Path, to: str = "cells", **options: object) -> Conversion:
    return Conversion(src, dst, to, quiet=True, **options)


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def journal_lines(dst: Path) -> list[dict]:
    return [json.loads(line) for line in (partial_folder(dst) / JOURNAL).read_text().splitlines()]


def count_units(monkeypatch) -> list[str]:
    """The names of the units that are written from now on."""
    written: list[str] = []
    original = convert_module._Converter._write_unit

    def counted(self, writer, unit, advance):
        written.append(unit.name)
        original(self, writer, unit, advance)

    monkeypatch.setattr(convert_module._Converter, "_write_unit", counted)
    return written


def die_after(conversion: Conversion, num_records: int) -> None:
    """Convert in this process, which is killed when the journal has that many records."""
    append = ConversionJournal.append

    def append_and_die(self, record):
        append(self, record)
        if len(self._records) == num_records:
            with (self.folder / JOURNAL).open("a") as file:
                file.write('{"kind":"unit","name":"cut sho')  # what a kill within a write would leave
            os.kill(os.getpid(), signal.SIGKILL)

    ConversionJournal.append = append_and_die
    convert(conversion)


@pytest.mark.parametrize("to", FORMATS)
def test_killed_conversion_goes_on_where_it_stopped(src, tmp_path, monkeypatch, to):
    conversion = job(src, tmp_path / "dst", to, verify=True)
    process = multiprocessing.get_context("fork").Process(target=die_after, args=(conversion, 3))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "dst").exists()
    written = count_units(monkeypatch)
    convert(conversion)
    assert written == ["layers.1", "layers.2", "head"]  # the embedding and layer 0 were in the journal
    assert not partial_folder(tmp_path / "dst").exists()
    assert not (tmp_path / "dst" / JOURNAL).exists()
    convert(job(tmp_path / "dst", tmp_path / "back", "hf"))
    assert same_weights(src, tmp_path / "back")


def test_full_disk_is_said_and_the_rest_follows_later(src, tmp_path, monkeypatch):
    calls = iter(range(100))
    pwrite = os.pwrite

    def full_after_a_while(fd: int, data: memoryview, offset: int) -> int:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(tensor_files.os, "pwrite", full_after_a_while)
    with pytest.raises(UserError, match=r"dst\.partial: the disk is full; what is done stays .* same command again"):
        convert(job(src, tmp_path / "dst"))
    monkeypatch.setattr(tensor_files.os, "pwrite", pwrite)
    done = [record["name"] for record in journal_lines(tmp_path / "dst")[1:]]
    assert 0 < len(done) < NUM_UNITS
    written = count_units(monkeypatch)
    convert(job(src, tmp_path / "dst", verify=True))
    assert len(written) == NUM_UNITS - len(done)
    convert(job(tmp_path / "dst", tmp_path / "back", "hf"))
    assert same_weights(src, tmp_path / "back")


def test_full_disk_under_a_megatron_file_is_said(src, tmp_path):
    partial = partial_folder(tmp_path / "dst")
    partial.mkdir()
    (partial / "__0_2.distcp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"dst\.partial: the disk is full"):
        convert(job(src, tmp_path / "dst", "megatron"))
    (partial / "__0_2.distcp").unlink()
    convert(job(src, tmp_path / "dst", "megatron", verify=True))


def test_too_little_room_is_said_before_anything_is_written(src, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    written = count_units(monkeypatch)
    with pytest.raises(
        UserError, match=r"dst\.partial: 0\.00 GB are still to be written, and the disk has 0\.00 GB free"
    ):
        convert(job(src, tmp_path / "dst"))
    assert written == []


def test_bits_that_change_on_the_way_are_found(src, tmp_path, monkeypatch):
    write_at = tensor_files.write_at

    def flip_one_bit(fd: int, data: memoryview, offset: int) -> None:
        changed = bytearray(data)
        if offset > 100_000:
            changed[len(changed) // 2] ^= 1
        write_at(fd, memoryview(changed), offset)

    monkeypatch.setattr(tensor_files, "write_at", flip_one_bit)
    with pytest.raises(
        UserError, match=r"does not read back as it was written: before_attention\.0, .* more; the disk or"
    ):
        convert(job(src, tmp_path / "dst", verify=True))
    assert not (tmp_path / "dst").exists()


def test_nothing_is_overwritten_unasked(src, tmp_path):
    dst = tmp_path / "dst"
    convert(job(src, dst))
    before = {path.name: path.stat().st_mtime_ns for path in dst.iterdir()}
    with pytest.raises(UserError, match=r"dst: exists already; .*--overwrite"):
        convert(job(src, dst, "megatron"))
    assert {path.name: path.stat().st_mtime_ns for path in dst.iterdir()} == before
    convert(job(src, dst, "megatron", overwrite=True))
    assert not list(dst.glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_only_checkpoints_are_overwritten(src, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="--overwrite replaces checkpoints only"):
        convert(job(src, dst, overwrite=True))
    assert (dst / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="source and destination are the same"):
        convert(job(src, src, overwrite=True))


def test_unfinished_conversion_of_other_settings_is_not_mixed_in(src, tmp_path):
    dst = tmp_path / "dst"
    partial_folder(dst).mkdir()
    (partial_folder(dst) / JOURNAL).write_text(json.dumps({"to": "cells", "max_tp": 2}) + "\n")
    with pytest.raises(UserError, match=r"unfinished conversion that differs in .*max_tp.*--overwrite"):
        convert(job(src, dst))
    convert(job(src, dst, overwrite=True, verify=True))


def test_two_conversions_into_one_folder_are_refused(src, tmp_path):
    journal = ConversionJournal(tmp_path / "dst", {}, restart=False)
    with pytest.raises(UserError, match="another conversion is writing there"):
        convert(job(src, tmp_path / "dst"))
    journal.close()


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"weights missing: model\.norm\.weight"),
        ({"model.layers.1.mlp.up_proj.bias": torch.ones(96)}, r"no place for: model\.layers\.1\.mlp\.up_proj\.bias"),
        ({"lm_head.weight": torch.ones(127, 64)}, r"lm_head\.weight has shape \(127, 64\), config\.json asks for"),
        ({"lm_head.weight": torch.ones(128, 64).to(torch.int8)}, r"lm_head\.weight is I8; only"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 64).half()}, r"different dtypes; give one with"),
    ],
)
def test_sources_that_do_not_fit_are_named(src, tmp_path, changes, message):
    rewrite(src, changes)
    with pytest.raises(UserError, match=message):
        convert(job(src, tmp_path / "dst"))
    assert not (tmp_path / "dst").exists()


def test_damaged_megatron_checkpoints_are_named(src, tmp_path):
    megatron = tmp_path / "megatron"
    convert(job(src, megatron, "megatron"))
    with (megatron / "__0_1.distcp").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"__0_1\.distcp: .*linear_qkv.* is truncated or damaged"):
        convert(job(megatron, tmp_path / "dst"))
    (megatron / "__0_1.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_1\.distcp: "):
        convert(job(megatron, tmp_path / "dst"))
    (megatron / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json there; copy config\.json and the tokenizer's files"):
        convert(job(megatron, tmp_path / "dst"))


def test_folders_of_no_known_format_are_refused(src, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        convert(job(tmp_path / "empty", tmp_path / "dst"))
    (tmp_path / "empty" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match=r"sharded_backend='zarr': only torch_dist"):
        convert(job(tmp_path / "empty", tmp_path / "dst"))
    with pytest.raises(UserError, match="only the cells format is cut"):
        convert(job(src, tmp_path / "dst", "hf", max_tp=2))


def large_model(folder: Path) -> ModelShape:
    """A checkpoint of 272 MiB whose largest weight is 4 MiB."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 17,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2048,
        "vocab_size": 1024,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shape = model_shape(read_hf_config(folder))
    writer = HFWriter(folder, shape, lambda weight: torch.bfloat16, largest_file=64 << 20)
    for unit in units_of(shape):
        writer.write(unit, ((w, torch.full(w.size, unit.index, dtype=torch.bfloat16)) for w in unit.weights))
    writer.finish({})
    writer.close()
    return shape


# Room for the weights in hand and for the allocator, which keeps freed pieces for each thread.
SPARE_BYTES = 160 << 20


def convert_within(conversion: Conversion, spare_bytes: int, total_bytes: int) -> None:
    """Convert while this process may have no more than `spare_bytes` of memory beyond what it has now."""
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (used + spare_bytes, used + spare_bytes))
    with pytest.raises(RuntimeError, match="memory"):
        torch.empty(total_bytes, dtype=torch.uint8)
    convert(conversion)
    os._exit(0)


@pytest.mark.parametrize(
    ("first", "second"), [("hf", "cells"), ("hf", "megatron"), ("cells", "hf"), ("megatron", "hf")]
)
def test_checkpoint_larger_than_the_memory_limit_is_converted(tmp_path, first, second):
    shape = large_model(tmp_path / "hf")
    total = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    if first != "hf":
        convert(job(tmp_path / "hf", tmp_path / first, first))
    conversion = job(tmp_path / first, tmp_path / "dst", second, verify=True, jobs=2)
    process = multiprocessing.get_context("fork").Process(target=convert_within, args=(conversion, SPARE_BYTES, total))
    process.start()
    process.join(120)
    assert total > 1.5 * SPARE_BYTES
    assert process.exitcode == 0
    assert shape.num_layers == 17
    assert (tmp_path / "dst").is_dir()


def test_command_line(src, tmp_path):
    command = [sys.executable, str(TOOL), str(src), str(tmp_path / "dst"), "--to", "cells", "--max-tp", "2", "--verify"]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "from hf to cells, 2 cells per layer" in done.stdout
    assert "B/s" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
