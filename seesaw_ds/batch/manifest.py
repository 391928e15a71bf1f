"""What a result file's contents depend on, kept beside it, so that a run never continues another's results.

Layouts and pool sizes are not in it: outputs do not depend on them, and a run may be continued under others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from seesaw_ds.batch.files import sync_folder
from seesaw_ds.errors import UserError

SCHEMA = 1
"""Number of this form of manifest, and of the outputs' dependence on what it lists."""

ManifestValue = str | int | float | None
Manifest = dict[str, ManifestValue]
"""Names such as ``input sha256`` or ``dtype`` with their values."""

HASHED_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of a model folder that are small and decide the output; weights are told apart by name and size."""


def manifest_path(output: Path) -> Path:
    """Where the manifest of a result file stands."""
    return output.with_name(output.name + ".manifest.json")


def describe_run(
    input_path: Path, model: str, *, load_format: str, dtype: str, max_model_len: int, seed: int
) -> Manifest:
    """The manifest of a run over `input_path` with the model in folder `model`. Reads the whole input once.

    Raises:
        UserError: the input or the model's config.json cannot be read.
    """
    manifest: Manifest = {
        "schema": SCHEMA,
        "input sha256": _sha256(input_path, f"input={input_path}"),
        "input bytes": input_path.stat().st_size,
        "model": model,
        "load_format": load_format,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "seed": seed,
    }
    return manifest | _describe_model(Path(model))


def check_or_create(path: Path, manifest: Manifest, *, has_results: bool) -> None:
    """Check that results in the file beside `path` come from the same run as `manifest`, or write it if none do.

    Raises:
        UserError: results without a manifest, or of a run that differs; each difference is named.
    """
    if not has_results:
        _write_atomically(path, manifest)
        return
    mend = "give another output, or start anew with --overwrite"
    try:
        recorded = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        text = f"the result file has results but no manifest {path}, so what made them is not known; {mend}"
        raise UserError(text) from error
    except (OSError, ValueError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}; {mend}") from error
    if not isinstance(recorded, dict):
        raise UserError(f"the manifest {path} must be a JSON object; {mend}")
    differences = _differences(recorded, manifest)
    if differences:
        raise UserError(
            "the result file was begun by a run that differs from this one:\n"
            + "".join(f"  {line}\n" for line in differences)
            + f"The first is recorded in {path}. Restore these, {mend}"
        )


def _differences(recorded: Manifest, manifest: Manifest) -> list[str]:
    names = [*manifest, *(name for name in recorded if name not in manifest)]
    return [
        f"{name}: {_shown(recorded, name)} then, {_shown(manifest, name)} now"
        for name in names
        if (name in recorded, recorded.get(name)) != (name in manifest, manifest.get(name))
    ]


def _shown(manifest: Manifest, name: str) -> str:
    return json.dumps(manifest[name], ensure_ascii=False) if name in manifest else "absent"


def _describe_model(folder: Path) -> Manifest:
    config = folder / "config.json"
    described: Manifest = {"model config.json sha256": _sha256(config, f"model={folder}: config.json")}
    for name in HASHED_MODEL_FILES[1:]:
        if (folder / name).is_file():
            described[f"model {name} sha256"] = _sha256(folder / name, f"model={folder}: {name}")
    for path in sorted(folder.glob("*.safetensors")):
        described[f"model {path.name} bytes"] = path.stat().st_size
    return described


def _sha256(path: Path, what: str) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _write_atomically(path: Path, manifest: Manifest) -> None:
    """Write beside the path and rename: a reader finds the old manifest or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"the manifest {path} cannot be written: {error.strerror}") from error
