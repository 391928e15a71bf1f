"""What can be known to be wrong before any process loads a model; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from seesaw_ds.batch.job import count_requests
from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.batch.manifest import Manifest, check_or_create, describe_run, manifest_path
from seesaw_ds.checkpoint.cell_layout import check_cells, is_cells_folder
from seesaw_ds.config import RunConfig, check_fit, dtype_name, max_model_len, parse_config
from seesaw_ds.engine.hardware import find_hardware
from seesaw_ds.errors import UserError
from seesaw_ds.model.checkpoint import check_checkpoint
from seesaw_ds.plan.memory import size_pools
from seesaw_ds.shapes import model_shape, read_hf_config


def load_config(path: str, settings: Sequence[str], input_path: str | None, output_path: str | None) -> RunConfig:
    """The YAML file at `path`, changed by ``key=value`` `settings` and by the command line's input and output.

    Raises UserError for a file that cannot be read and for any setting that is unknown or of the wrong type.
    """
    try:
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold settings as key: value")
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting}: must be key=value")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {setting}: the value is not YAML; quote text with special characters") from None
    if input_path is not None:
        values["input"] = input_path
    if output_path is not None:
        values["output"] = output_path
    return parse_config(values)


def check_run(run: RunConfig, world_size: int) -> None:
    """Check settings against ranks, model and files. Raises UserError with the first thing that does not fit.

    With layouts "auto" what depends on them is left out: they are checked once they are chosen.
    """
    shape = model_shape(read_hf_config(run.model))
    check_fit(run, shape, world_size)
    if run.hardware is not None:
        find_hardware(run.hardware)
    if not run.has_auto_layouts:
        # Pools given in blocks must hold a request on any machine; what memory allows is checked on the device.
        size_pools(run, shape, device_bytes=1 << 50)
    try:
        Path(run.input).open("rb").close()
    except OSError as error:
        raise UserError(f"input={run.input!r}: cannot be read ({error.strerror})") from None
    if run.load_format == "auto":
        if is_cells_folder(run.model):
            check_cells(run.model, shape, 1 if run.has_auto_layouts else run.layout_pair.cells_per_layer)
        else:
            check_checkpoint(run.model, shape)


def run_manifest(run: RunConfig) -> Manifest:
    """What the results of `run` depend on. Reads the whole input."""
    shape = model_shape(read_hf_config(run.model))
    return describe_run(
        Path(run.input),
        run.model,
        load_format=run.load_format,
        dtype=dtype_name(run, shape),
        max_model_len=max_model_len(run, shape),
        seed=run.seed,
    )


def is_finished(run: RunConfig, overwrite: bool) -> bool:
    """Whether an earlier run has left a result for every line of the input, so that there is nothing to do.

    Raises UserError when the results cannot be written, or are not to be continued by `run`.
    """
    with ResultJournal(Path(run.output)) as journal:
        if overwrite or journal.is_empty:
            return False
        check_or_create(manifest_path(journal.path), run_manifest(run), has_results=True)
        journal.resume()
        # Every line has one record of its own, and the manifest says that they are this input's lines.
        return journal.num_done == count_requests(Path(run.input))
