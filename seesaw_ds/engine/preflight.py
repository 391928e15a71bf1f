"""What can be known to be wrong before any process loads a model; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from seesaw_ds.batch.journal import ResultJournal
from seesaw_ds.config import RunConfig, check_fit, parse_config
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
        values[key.strip()] = yaml.safe_load(value)
    if input_path is not None:
        values["input"] = input_path
    if output_path is not None:
        values["output"] = output_path
    return parse_config(values)


def check_run(run: RunConfig, world_size: int) -> None:
    """Check settings against ranks, model and files. Raises UserError with the first thing that does not fit."""
    shape = model_shape(read_hf_config(run.model))
    check_fit(run, shape, world_size)
    # Pools given in blocks must hold a request on any machine; what memory allows is checked on the device.
    size_pools(run, shape, device_bytes=1 << 50)
    try:
        Path(run.input).open("rb").close()
    except OSError as error:
        raise UserError(f"input={run.input!r}: cannot be read ({error.strerror})") from None
    if run.load_format == "auto":
        check_checkpoint(run.model, shape)
    ResultJournal(Path(run.output)).close()
